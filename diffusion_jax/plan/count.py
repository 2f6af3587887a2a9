"""Count what one device does in a compiled program, with loops as often as they run.

XLA's own cost analysis counts the body of a loop once. This counts matrix products and
convolutions, as `devices.flops` does, the bytes of collectives, and the cycles that the TPU
compiler expects each operation to take.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffusion_jax.devices.flops import taps
from diffusion_jax.plan.hlo import (
    Op,
    Program,
    branches,
    bytes_of,
    called,
    shape_of,
    trip_count,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# How often the bytes of a collective pass the links of a device, in a large ring; 1 for others.
_PASSES = {"all-reduce": 2}
# Operations that run another computation once, with the attribute that names it.
_CALLS = {
    "fusion": "calls",
    "fusion-start": "calls",
    "call": "to_apply",
    "async-start": "calls",
}
# How the TPU compiler writes a reduce-scatter: a fusion of all-reduce and slice.
_REDUCE_SCATTER = "all-reduce-scatter"


class Counts(NamedTuple):
    """What one device does in a program.

    collective_bytes, collectives: by kind, what they carry and how many run. cycles: as the TPU
    compiler expects. kernels: how many custom kernels run; their FLOPs and cycles are not in the
    text. unknown_loops: how many loops count once because their length is not known.
    """

    flops: int = 0
    collective_bytes: Mapping[str, int] = {}
    collectives: Mapping[str, int] = {}
    cycles: int = 0
    kernels: int = 0
    unknown_loops: int = 0


def count(program: Program, *, loops: bool = True) -> Counts:
    """Count a program; loops=False counts the body of each loop once, as XLA does."""

    @functools.cache
    def of(name: str) -> Counts:
        computation = program.computations[name]
        total = Counts()
        for op in computation.values():
            total = _add(total, own_counts(computation, op))
            if op.opcode == "while":
                times = trip_count(program, computation, op) if loops else 1
                inside = [called(op, "body"), called(op, "condition")]
                turn = functools.reduce(_add, [of(n) for n in inside if n is not None])
                total = _add(total, turn, 1 if times is None else times)
                total = total._replace(unknown_loops=total.unknown_loops + (times is None))
            elif op.opcode == "conditional":
                total = _add(total, max(map(of, branches(op)), key=lambda c: (c.flops, c.cycles)))
            elif op.opcode in _CALLS and (inner := called(op, _CALLS[op.opcode])) is not None:
                counts = of(inner)
                if op.opcode.startswith("fusion"):  # has cycles of its own
                    counts = counts._replace(cycles=0)
                if inner.startswith(_REDUCE_SCATTER):
                    counts = _as_reduce_scatter(counts)
                total = _add(total, counts)
        return total

    return of(program.entry)


def linked_bytes(counts: Counts) -> int:
    """Sum the bytes that pass the links of a device in collectives."""
    passes = lambda kind: _PASSES[kind] if kind in _PASSES else 1
    return sum(passes(kind) * carried for kind, carried in counts.collective_bytes.items())


def _add(a: Counts, b: Counts, times: int = 1) -> Counts:
    """Compute a + times * b."""
    return Counts(
        a.flops + times * b.flops,
        _add_kinds(a.collective_bytes, b.collective_bytes, times),
        _add_kinds(a.collectives, b.collectives, times),
        a.cycles + times * b.cycles,
        a.kernels + times * b.kernels,
        a.unknown_loops + b.unknown_loops,
    )


def _add_kinds(a: Mapping[str, int], b: Mapping[str, int], times: int) -> Mapping[str, int]:
    if not b:
        return a
    return Counter(a) + Counter({kind: times * value for kind, value in b.items()})


def _as_reduce_scatter(counts: Counts) -> Counts:
    def renamed(kinds: Mapping[str, int]) -> Mapping[str, int]:
        return {"reduce-scatter" if k == "all-reduce" else k: v for k, v in kinds.items()}

    return counts._replace(
        collective_bytes=renamed(counts.collective_bytes), collectives=renamed(counts.collectives)
    )


def own_counts(computation: Mapping[str, Op], op: Op) -> Counts:
    """Count what an operation does itself, without the computations that it calls."""
    cycles = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
    counts = Counts(cycles=int(cycles[1]) if cycles else 0)
    if op.opcode == "dot":
        return counts._replace(flops=_dot_flops(computation, op))
    if op.opcode == "convolution":
        lhs, rhs = (shape_of(computation[name].result) for name in op.operands[:2])
        return counts._replace(flops=_convolution_flops(lhs, rhs, shape_of(op.result), op.rest))
    if op.opcode == "custom-call":
        if '"tpu_custom_call"' in op.rest:
            return counts._replace(kernels=1)
        return counts._replace(flops=_library_flops(computation, op))
    kind = op.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        carried = _carried(computation, op, kind)
        return counts._replace(collective_bytes={kind: carried}, collectives={kind: 1})
    return counts


def _carried(computation: Mapping[str, Op], op: Op, kind: str) -> int:
    """Count the bytes of the larger side: the result of an all-gather, else the operands."""
    given = bytes_of(computation[name].result for name in op.operands)
    if kind != "all-gather":
        return given
    # The result of an all-gather-start holds the operands too.
    return bytes_of([op.result]) - (given if op.opcode.endswith("-start") else 0)


def _dot_flops(computation: Mapping[str, Op], op: Op) -> int:
    lhs = shape_of(computation[op.operands[0]].result)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    axes = [] if contracted is None or not contracted[1] else contracted[1].split(",")
    return 2 * math.prod(shape_of(op.result)) * math.prod(lhs[int(axis)] for axis in axes)


def library_call(op: Op) -> str:
    """Read which function of cuDNN or cuBLAS a custom call is; "" for any other operation."""
    match = re.search(r'custom_call_target="__(\w+\$\w+)', op.rest)
    return "" if op.opcode != "custom-call" or match is None else match[1]


def _library_flops(computation: Mapping[str, Op], op: Op) -> int:
    """Count the FLOPs of a call of cuDNN or cuBLAS; 0 for any other custom call.

    Gradients of a convolution are written with the window of the convolution itself.
    """
    name = library_call(op)
    shapes = [shape_of(computation[operand].result) for operand in op.operands]
    out = shape_of(op.result)
    if name == "cudnn$convBackwardInput":
        return _convolution_flops(out, shapes[1], shapes[0], op.rest)
    if name == "cudnn$convBackwardFilter":
        return _convolution_flops(shapes[0], out, shapes[1], op.rest)
    if name.startswith("cudnn$conv"):
        return _convolution_flops(shapes[0], shapes[1], out, op.rest)
    if name.startswith("cudnn$fmha"):  # operands [b t n h] or [b n t h], scores [b n t s]
        found = re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)', op.rest)
        keys = int(found[1].split(",")[-1].strip(' "')) if found else 0
        return (10 if "Backward" in name else 4) * math.prod(shapes[0]) * keys
    if name.startswith("cublas$"):
        contracted = re.search(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', op.rest)
        axes = re.findall(r"\d+", contracted[1]) if contracted else []
        return 2 * math.prod(out) * math.prod(shapes[0][int(axis)] for axis in axes)
    return 0


def _convolution_flops(
    lhs: Sequence[int], rhs: Sequence[int], out: Sequence[int], rest: str
) -> int:
    """Count the products with elements of lhs only, as `devices.flops` does.

    On a TPU a batched dot becomes a convolution: its batch is a dimension of the window, which is
    mostly padding.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels is not None
    window = _window(rest)
    total = 2 * rhs[labels[2].index("i")]
    total *= out[labels[3].index("b")] * out[labels[3].index("f")]
    for i in range(len(labels[1]) - 2):
        a, k, o = (labels[n].index(str(i)) for n in (1, 2, 3))
        total *= taps(
            lhs[a],
            rhs[k],
            out[o],
            stride=window["stride"][i] if "stride" in window else 1,
            low=window["pad"][i] if "pad" in window else 0,
            lhs_dilation=window["lhs_dilate"][i] if "lhs_dilate" in window else 1,
            rhs_dilation=window["rhs_dilate"][i] if "rhs_dilate" in window else 1,
        )
    return total


def _window(rest: str) -> dict[str, list[int]]:
    """Read window={size=3x3 pad=1_1x1_1} as numbers; of pad, the ones before the first element."""
    match = re.search(r"window=\{([^}]*)\}", rest)
    fields = [] if match is None else [field.split("=") for field in match[1].split()]
    return {name: [int(v.split("_")[0]) for v in value.split("x")] for name, value in fields}
