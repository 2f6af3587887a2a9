"""Read the text of a compiled program: computations, operations, shapes, and how often loops run.

The text is what `jax.stages.Compiled.as_text()` gives: one operation a line, in computations that
call each other.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple


class Op(NamedTuple):
    """One operation. result: its type as text, perhaps of a tuple. rest: all attributes."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    arguments: str
    rest: str
    is_root: bool


class Frame(NamedTuple):
    """A line of Python that an operation comes from, and the frame that called it (None: none)."""

    file: str
    line: int
    caller: int | None


class Program(NamedTuple):
    """A program: computations {name: {operation name: operation}}, and the name of the first.

    frames: lines of Python by the number that operations have in stack_frame_id.
    """

    computations: Mapping[str, Mapping[str, Op]]
    entry: str
    frames: Mapping[int, Frame] = {}


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_LEAF = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


def parse(text: str) -> Program:
    """Parse the text of a program; ValueError when it has no entry computation."""
    computations: dict[str, dict[str, Op]] = {}
    entry, current, last = None, None, None
    lines = text.splitlines()
    for line in lines:
        if current is None:
            header = _HEADER.match(line)
            if header is not None:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            current = None
        elif line.startswith(" "):
            last = _parse_op(line)
            if last is not None:
                current[last.name] = last
        elif last is not None:  # attributes of custom kernels have line breaks in them
            last = last._replace(rest=last.rest + line)
            current[last.name] = last
    if entry is None:
        raise ValueError("the text of the program has no entry computation")
    return Program(computations, entry, _parse_frames(lines))


_FILE = re.compile(r'^(\d+) "(.*)"$')
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")


def _parse_frames(lines: Iterable[str]) -> dict[int, Frame]:
    """Read the tables FileNames, FileLocations and StackFrames above the first computation."""
    tables: dict[str, list[str]] = {}
    table: list[str] = []
    for line in lines:
        if line.endswith("{"):
            break
        if re.fullmatch(r"FileNames|FunctionNames|FileLocations|StackFrames", line):
            table = tables.setdefault(line, [])
        table.append(line)
    read = lambda name, pattern: [
        m.groups() for x in tables.get(name, ()) if (m := pattern.match(x))
    ]
    files = {int(n): file for n, file in read("FileNames", _FILE)}
    places = {int(n): (files[int(f)], int(line)) for n, f, line in read("FileLocations", _LOCATION)}
    frames = {}
    for number, place, parent in read("StackFrames", _FRAME):
        # XLA writes the number of the caller plus one, and one where there is none.
        caller = int(parent) - 1 if parent else 0
        frames[int(number)] = Frame(*places[int(place)], caller or None)
    return frames


def source(program: Program, op: Op) -> Iterator[Frame]:
    """Walk from the line that an operation comes from to the lines that called it."""
    written = re.search(r'source_file="([^"]+)" source_line=(\d+)', op.rest)
    if written is not None:  # as older compilers do
        yield Frame(written[1], int(written[2]), None)
    match = re.search(r"\bstack_frame_id=(\d+)", op.rest)
    number = int(match[1]) if match else None
    while number is not None and number in program.frames:
        frame = program.frames[number]
        yield frame
        number = frame.caller


def _parse_op(line: str) -> Op | None:
    left, equals, right = line.partition(" = ")
    if not equals:
        return None
    left = left.strip()
    name = left.removeprefix("ROOT ").lstrip("%")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    match = _OPCODE.match(right, end)
    if end < 1 or match is None:
        return None
    close = _closing(right, match.end() - 1)
    arguments = right[match.end() : close]
    return Op(
        name,
        match[1],
        right[:end],
        tuple(_NAME.findall(arguments)),
        arguments,
        right[close + 1 :],
        left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Find the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
            if depth == 0:
                return position
    return len(text)


def called(op: Op, key: str) -> str | None:
    """Read the name of a computation in an attribute such as calls=%x."""
    match = re.search(rf"\b{key}=%?([\w.\-]+)", op.rest)
    return None if match is None else match[1]


def branches(op: Op) -> list[str]:
    """List the computations of a conditional."""
    match = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
    if match is not None:
        return _NAME.findall(match[1])
    keys = ("true_computation", "false_computation")
    return [name for key in keys if (name := called(op, key)) is not None]


def shape_of(result: str) -> tuple[int, ...]:
    """Read the shape in an array type such as f32[2,3]{1,0}."""
    match = _LEAF.search(result)
    return () if match is None or not match[2] else tuple(map(int, match[2].split(",")))


def bytes_of(results: Iterable[str]) -> int:
    """Sum the bytes of array types, and of the leaves of tuple types, without padding."""
    total = 0
    for result in results:
        for dtype, shape in _LEAF.findall(result):
            count = math.prod(map(int, shape.split(","))) if shape else 1
            total += -(-count * _bits(dtype) // 8)
    return total


def _bits(dtype: str) -> int:
    match = _BITS.search(dtype)
    if match is not None:
        return int(match[0])
    return 8 if dtype == "pred" else 0  # tokens and opaque values


def trip_count(program: Program, computation: Mapping[str, Op], loop: Op) -> int | None:
    """Find how often the body of a while operation runs; None where the text does not tell.

    Either XLA has noted it, or the condition compares a counter with a constant and the body adds a
    constant to the counter.
    """
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
    if known is not None:
        return int(known[1])
    condition = program.computations[called(loop, "condition") or ""]
    body = program.computations[called(loop, "body") or ""]
    compared = _comparison(program, condition)
    if compared is None:
        return None
    direction, counter, limit = compared
    start = _constant(computation, _element(computation, loop.operands[0], counter))
    step = _step(program, body, counter)
    if start is None or not step:
        return None
    last = {"LT": limit, "LE": limit + 1, "GT": limit, "GE": limit - 1, "NE": limit}[direction]
    return max(0, -(-(last - start) // step))


def _comparison(program: Program, condition: Mapping[str, Op]) -> tuple[str, int, int] | None:
    """Read a loop's condition: (direction, index of the counter in the carried tuple, limit)."""
    root = next(op for op in condition.values() if op.is_root)
    names: Sequence[str] = root.operands
    if root.opcode == "fusion":
        inner = program.computations[called(root, "calls") or ""]
        outer, root = root, next(op for op in inner.values() if op.is_root)
        names = [_outside(inner, name, outer) for name in root.operands]
    direction = re.search(r"direction=(LT|LE|GT|GE|NE)", root.rest)
    if root.opcode != "compare" or direction is None:
        return None
    counter, limit = (_tuple_index(condition, names[0]), _constant(condition, names[1]))
    if counter is None or limit is None:
        return None
    return direction[1], counter, limit


def _outside(inner: Mapping[str, Op], name: str, call: Op) -> str:
    """Find the operand of a fusion that one of its parameters stands for."""
    op = inner[name]
    return call.operands[int(op.arguments)] if op.opcode == "parameter" else name


def _tuple_index(computation: Mapping[str, Op], name: str) -> int | None:
    op = _uncopied(computation, name)
    match = None if op is None else re.search(r"index=(\d+)", op.rest)
    return int(match[1]) if op and match and op.opcode == "get-tuple-element" else None


def _element(computation: Mapping[str, Op], name: str, index: int) -> str:
    op = computation[name]
    return op.operands[index] if op.opcode == "tuple" and index < len(op.operands) else name


def _constant(computation: Mapping[str, Op], name: str) -> int | None:
    op = _uncopied(computation, name)
    if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.arguments):
        return None
    return int(op.arguments)


def _uncopied(computation: Mapping[str, Op], name: str) -> Op | None:
    op = computation[name] if name in computation else None
    while op is not None and op.opcode in ("copy", "bitcast", "convert") and op.operands:
        op = computation[op.operands[0]] if op.operands[0] in computation else None
    return op


def _step(program: Program, body: Mapping[str, Op], counter: int) -> int | None:
    """Find what one turn of the body adds to the counter."""
    root = next(op for op in body.values() if op.is_root)
    if root.opcode != "tuple" or counter >= len(root.operands):
        return None
    op = _uncopied(body, root.operands[counter])
    if op is None:
        return None
    if op.opcode == "fusion":
        inner = program.computations[called(op, "calls") or ""]
        added = next(o for o in inner.values() if o.is_root)
        names = [_outside(inner, name, op) for name in added.operands]
        constants = [_constant(body, n) or _constant(inner, n) for n in names]
    else:
        added = op
        constants = [_constant(body, name) for name in op.operands]
    found = [value for value in constants if value is not None]
    if added.opcode == "subtract" and len(constants) == 2 and constants[1] is not None:
        return -constants[1]
    return found[0] if added.opcode == "add" and found else None
