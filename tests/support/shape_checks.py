"""The checker of shapes in signatures, made once for each function of the source.

jaxtyping hands on a new stand-in for a function each time that its `def` runs, so a function within
a function would be compiled anew by beartype at every call of the outer one: a fifth of the time
that tests spend in Python. And a session calls few of the 2,400 functions of the package: what
checks one is made at its first call, or importing the package would take 8 s instead of 3.
"""

from collections.abc import Callable

from beartype import beartype

_made: dict[tuple, Callable] = {}


def checked(stand_in: Callable) -> Callable:
    """Check the arguments of a stand-in, or the result that it is handed, by its annotations."""
    code = stand_in.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    hints = tuple(stand_in.__annotations__.items())
    key = (stand_in.__module__, stand_in.__qualname__, names, hints)
    if key not in _made:
        _made[key] = _at_the_first_call(stand_in)
    return _made[key]


def _at_the_first_call(stand_in: Callable) -> Callable:
    made = None

    def check(*args: object, **kwargs: object) -> None:
        nonlocal made
        if made is None:
            made = beartype(stand_in)
        made(*args, **kwargs)

    return check
