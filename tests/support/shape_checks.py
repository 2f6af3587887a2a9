"""The checker of shapes in signatures, made once for each function of the source.

jaxtyping hands on a new stand-in for a function each time that its `def` runs, so a function within
a function would be compiled anew by beartype at every call of the outer one: a fifth of the time
that tests spend in Python. And a session calls few of the 2,400 functions of the package: what
checks one is made at its first call, or importing the package would take 8 s instead of 3.
A function within a function that has no annotations is left as it is: there is nothing to check,
and jaxtyping would compile two stand-ins for it whenever its `def` runs.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import beartype

_made: dict[tuple, Callable] = {}


def install() -> None:
    """Check the signatures of all modules of diffusion_jax that are imported from now on."""
    jaxtyping.install_import_hook("diffusion_jax", f"{__name__}.{checked.__name__}")
    jaxtyping.jaxtyped = _where_annotated(jaxtyping.jaxtyped)  # what the hook's decorators call


def _where_annotated(jaxtyped: Callable) -> Callable:
    def decorator(*, typechecker: Callable) -> Callable[[Any], Any]:
        replace = jaxtyped(typechecker=typechecker)
        is_bare = lambda made: isinstance(made, FunctionType) and not made.__annotations__
        return lambda made: made if is_bare(made) else replace(made)

    return decorator


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
