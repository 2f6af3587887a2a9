"""A floor for the time of a compiled step: what its operations must compute and move at least.

Each operation takes the longer of two times: its FLOPs at the chip's peak, and its bytes, every
operand read once from memory and every result written once, at the memory's bandwidth. Operations
run one after another. A device is slower: no kernel reaches both peaks, and starting one takes
time. Where an operand is still in a cache it may also be faster. What the compiler keeps in the
vector memory of a TPU is not moved.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from diffusion_jax.devices.chips import Chip
from diffusion_jax.plan.count import COLLECTIVES, count, library_call, linked_bytes, own_counts
from diffusion_jax.plan.hlo import Op, Program, branches, bytes_of, called, source, trip_count

Computation: TypeAlias = Mapping[str, Op]

# Operations that neither compute nor move anything.
FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast after-all domain opt-barrier partition-id "
    "replica-id".split()
)
# What a fusion that only moves data consists of.
MOVES = frozenset(
    "parameter constant bitcast tuple get-tuple-element copy transpose reshape slice concatenate "
    "pad broadcast dynamic-slice dynamic-update-slice reverse".split()
)
# Operations that read only as much as they give, wherever it lies in their first operand.
SLICES = ("dynamic-slice", "slice", "gather")
KINDS = (
    "convolution",
    "matrix product",
    "attention",
    "norm, element-wise",
    "transpose, copy",
    "optimizer",
    "collective",
)
# The type of an array, and of one in the vector memory (VMEM) of a TPU; on a GPU the memory space
# of this number is ordinary memory.
_LEAF = re.compile(r"\b[a-z]\w*\[[\d,]*\](?:\{[^{}]*\})?")
_IN_VMEM = re.compile(r"\b[a-z]\w*\[[\d,]*\]\{[^{}]*S\(1\)[^{}]*\}")
# Scratch memory of a function of cuDNN or cuBLAS stands last in its result; how much of it a
# function touches is not known.
_WORKSPACE = re.compile(r", [su]8\[\d*\][^ ]*\)$")
# Lines of these files and packages are the optimizer's.
_OPTIMIZER = re.compile(r"/optax/|diffusion_jax/train/(optimizer|(power_)?ema|lr_schedules)\.py$")
# Where derivatives come from says more than the rule that calls them.
_OURS = re.compile(r"\bdiffusion_jax/(?!plan/|models/layers/derivatives).*\.py$")


class Work(NamedTuple):
    """An operation of a program, as often as it runs in a step.

    flops, bytes, seconds: of all its runs, on one device. place: the line of this package that it
    comes from, or "".
    """

    name: str
    kind: str
    runs: int
    flops: int
    bytes: int
    seconds: float
    place: str


def floor(program: Program, chip: Chip, kernel_flops: float = 0) -> list[Work]:
    """List what a device does in a step, the operation that takes longest first.

    kernel_flops: of custom kernels, whose FLOPs a program does not tell; split evenly among them.
    """
    executed = list(_executed(program, program.entry, 1))
    size = _in_hbm if chip.capability is None else _whole
    kernels = sum(runs * own_counts(around, op).kernels for around, op, runs in executed)
    work = []
    for around, op, runs in executed:
        counts = own_counts(around, op)
        flops, moved = _flops(program, around, op), _bytes(program, around, op, size)
        if counts.kernels:
            flops = round(kernel_flops / kernels)
        links = linked_bytes(counts) / chip.interconnect
        seconds = max(flops / chip.peak_flops, moved / chip.hbm_bandwidth, links)
        kind, place = _kind(program, op), _place(program, op)
        work.append(Work(op.name, kind, runs, runs * flops, runs * moved, runs * seconds, place))
    return sorted(work, key=lambda w: -w.seconds)


def by_kind(work: Sequence[Work]) -> dict[str, Work]:
    """Sum over the operations of each kind, in the order of KINDS."""
    totals = {}
    for kind in KINDS:
        columns = list(zip(*(w[2:6] for w in work if w.kind == kind), strict=True))
        if columns:
            runs, flops, moved, seconds = (sum(column) for column in columns)
            totals[kind] = Work("", kind, runs, flops, moved, seconds, "")
    return totals


def _executed(program: Program, name: str, runs: int) -> Iterator[tuple[Computation, Op, int]]:
    """Walk over the operations that a computation runs, with how often each of them runs."""
    computation = program.computations[name]
    for op in computation.values():
        if op.opcode == "while":
            times = trip_count(program, computation, op)
            yield from _executed(program, called(op, "body") or "", runs * (times or 1))
        elif op.opcode == "conditional":
            # As in `count`, the branch with the most FLOPs.
            costs = {inner: count(program._replace(entry=inner)).flops for inner in branches(op)}
            yield from _executed(program, max(costs, key=lambda inner: costs[inner]), runs)
        elif op.opcode in ("call", "async-start"):
            inner = called(op, "to_apply" if op.opcode == "call" else "calls")
            yield from _executed(program, inner or "", runs)
        elif op.opcode not in FREE and not op.opcode.endswith(("-done", "-update")):
            yield computation, op, runs


def _inside(program: Program, op: Op) -> Computation:
    """Find the operations that a fusion is made of; nothing for another operation."""
    name = called(op, "calls") if op.opcode in ("fusion", "fusion-start") else None
    return {} if name is None else program.computations[name]


def _flops(program: Program, around: Computation, op: Op) -> int:
    inner = _inside(program, op)
    own = own_counts(around, op).flops
    return own + sum(_flops(program, inner, each) for each in inner.values())


def _opcodes(program: Program, op: Op) -> set[str]:
    inner = _inside(program, op)
    if not inner:
        return {op.opcode.removesuffix("-start")}
    return set().union(*(_opcodes(program, each) for each in inner.values()))


def _kind(program: Program, op: Op) -> str:
    library, opcodes = library_call(op), _opcodes(program, op)
    by_name = re.search(r'op_name="[^"]*\bdot_general', op.rest)  # TPUs have no other products
    if op.opcode.removesuffix("-start") in COLLECTIVES:
        return "collective"
    if library.startswith("cudnn$fmha") or '"tpu_custom_call"' in op.rest:
        return "attention"
    if library.startswith("cublas$") or "dot" in opcodes:
        return "matrix product"
    if library.startswith("cudnn$conv") or "convolution" in opcodes:
        return "matrix product" if by_name and not library else "convolution"
    if any(_OPTIMIZER.search(frame.file) for frame in source(program, op)):
        return "optimizer"
    return "transpose, copy" if opcodes <= MOVES else "norm, element-wise"


def _place(program: Program, op: Op) -> str:
    """Name the innermost line of this package that an operation comes from."""
    for frame in source(program, op):
        if _OURS.search(frame.file):
            return f"{frame.file.rpartition('diffusion_jax/')[2]}:{frame.line}"
    return ""


def _whole(op: Op) -> int:
    return bytes_of([op.result])


def _in_hbm(op: Op) -> int:
    return bytes_of([_IN_VMEM.sub("", op.result)])


def _bytes(program: Program, around: Computation, op: Op, size: Callable[[Op], int]) -> int:
    """Count the bytes that an operation reads and writes. size: of an operation's result."""

    def given(name: str) -> int:
        return size(around[name]) if name in around else 0

    inner = _inside(program, op)
    if inner:
        away = {name for name in op.operands if name in around and not given(name)}
        return _read(inner, op, away) + _written(inner, op, size)
    if op.opcode in SLICES:
        return 2 * size(op)
    if op.opcode == "dynamic-update-slice":
        return 2 * given(op.operands[1])
    if op.opcode == "copy-start":  # whose result is the copy, and the operand again
        copy = op._replace(result=_LEAF.findall(op.result)[0])
        return size(copy) + given(op.operands[0])
    result = _WORKSPACE.sub(")", op.result) if library_call(op) else op.result
    return size(op._replace(result=result)) + sum(given(name) for name in set(op.operands))


def _read(inner: Computation, fusion: Op, away: Collection[str]) -> int:
    """Count what a fusion reads: of an operand that is only sliced, the slices.

    away: operands that are not in the memory.
    """
    users: dict[str, list[Op]] = {}
    for op in inner.values():
        for name in set(op.operands):
            users.setdefault(name, []).append(op)

    def read(name: str) -> int:
        total, whole = 0, bytes_of([inner[name].result])
        for op in users.get(name, ()):
            first = op.operands[0] == name and name not in op.operands[1:]
            if op.opcode in ("bitcast", "convert"):
                total += read(op.name) * whole // max(1, bytes_of([op.result]))
            elif first and op.opcode in SLICES:
                total += bytes_of([op.result])
            elif not (first and op.opcode == "dynamic-update-slice"):
                return whole
        return min(total, whole)

    parameters = [op for op in inner.values() if op.opcode == "parameter"]
    seen = {fusion.operands[int(op.arguments)]: op.name for op in parameters}
    return sum(read(name) for operand, name in seen.items() if operand not in away)


def _written(inner: Computation, fusion: Op, size: Callable[[Op], int]) -> int:
    """Count what a fusion writes: of a result that is updated in place, the update."""
    root = next(op for op in inner.values() if op.is_root)
    results: Iterable[tuple[str, str]] = [(root.name, fusion.result)]
    if root.opcode == "tuple":
        results = zip(root.operands, _LEAF.findall(fusion.result), strict=True)
    total = 0
    for name, result in results:
        op, written = inner[name], size(fusion._replace(result=result))
        while op.opcode == "bitcast":
            op = inner[op.operands[0]]
        if written and op.opcode == "dynamic-update-slice":
            written = bytes_of([inner[op.operands[1]].result])
        total += written
    return total
