"""A machine that carries out a pickle without calling anything: dictionaries, numbers, names.

A pickle is a program with a stack. Here it makes plain values only; each name that it looks up and
each call that it asks for is answered by two functions of the reader. What it costs grows with its
length alone: keys are plain values, because the hash of nested tuples can take for ever.
"""

import itertools
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple


class Inert(NamedTuple):
    """A stand-in for an object of another library, to which nothing happens."""


INERT = Inert()
MAX_BYTES, MAX_INSTRUCTIONS = 2**26, 1_000_000
_KEYS = (str, bytes, int, float, bool, type(None))
_IGNORED = ("PROTO", "FRAME")
_FRESH: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_SET": lambda: INERT,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUSH = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT "
    "BINFLOAT".split()
)


class Answers(NamedTuple):
    """What a pickle gets for its questions.

    look_up: (module, name) -> what a name stands for. call: (what was looked up, arguments) -> the
    result. load: persistent id -> what it stands for.
    """

    look_up: Callable[[str, str], Any]
    call: Callable[[Any, tuple], Any]
    load: Callable[[Any], Any]


def run_pickle(source: Any, answers: Answers) -> Any:
    """Carry out one pickle, bytes or a binary file at its start -> the value that it describes.

    Raises ValueError for a damaged or too long one, and what the answers raise.
    """
    machine = _Machine(answers)
    try:
        instructions = pickletools.genops(source)
        for opcode, argument, _ in itertools.islice(instructions, MAX_INSTRUCTIONS):
            machine.step(opcode.name, argument)
        if next(instructions, None) is not None:
            raise ValueError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        (value,) = machine.stack
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return value


class _Machine:
    """The stack, the marks on it and the memo of a pickle that is carried out."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction; ValueError for one that no list of weights needs."""
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name in ("BINGET", "GET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "PUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("POP", "STOP"):
            self._drop(name)
        elif name not in _IGNORED:
            self._compose(name, argument)

    def _drop(self, name: str) -> None:
        if name == "POP" and self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        elif name == "POP":
            self.stack.pop()

    def _compose(self, name: str, argument: Any) -> None:
        stack, look_up, call = self.stack, self.answers.look_up, self.answers.call
        if name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "LIST":
            stack.append(self._marked())
        elif name == "DICT":
            stack.append(_updated({}, self._marked()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _updated(stack[-1], items)
        elif name == "POP_MARK":
            self._marked()
        elif name == "FROZENSET":
            self._marked()
            stack.append(INERT)
        elif name == "GLOBAL":
            stack.append(look_up(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, what = self._taken(2)
            stack.append(look_up(str(module), str(what)))
        elif name in ("REDUCE", "NEWOBJ"):
            what, arguments = self._taken(2)
            stack.append(call(what, tuple(arguments)))
        elif name == "NEWOBJ_EX":
            what, arguments, _ = self._taken(3)
            stack.append(call(what, tuple(arguments)))
        elif name == "OBJ":
            what, *arguments = self._marked()
            stack.append(call(what, tuple(arguments)))
        elif name == "INST":
            what = look_up(*argument.split(" ", 1))
            stack.append(call(what, tuple(self._marked())))
        elif name == "BUILD":  # nothing here has a state that could be set
            stack.pop()
        elif name == "BINPERSID":
            stack.append(self.answers.load(stack.pop()))
        else:
            raise ValueError(f"it has the instruction {name}, which no list of weights needs")

    def _taken(self, count: int) -> list[Any]:
        taken = self.stack[-count:]
        if len(taken) < count:
            raise IndexError("the stack is empty")
        del self.stack[-count:]
        return taken

    def _marked(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        place = self.marks.pop()
        taken = self.stack[place:]
        del self.stack[place:]
        return taken


def _updated(target: Any, items: list[Any]) -> Any:
    """Put keys and values, in turn, into a dictionary; other targets stay as they are."""
    if isinstance(target, dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if isinstance(key, _KEYS))
    return target
