"""From a section of a config to the keywords of one function, checked before anything runs."""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
from beartype import BeartypeConf
from beartype.door import is_bearable

# An int where a float is asked for is fine (PEP 484), as it is for every Python function.
_NUMERIC_TOWER = BeartypeConf(is_pep484_tower=True)


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class ConfigError(ValueError):
    """A config that cannot be built; the message names the path, the value and what would be
    right."""


def pick(table: Mapping[str, Any], name: str, path: str) -> Any:
    """Look up a name of a config in an explicit table; raise ConfigError with the choices when it
    is not there."""
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{path} = {name!r} is unknown; {_choices(name, table)}")
    return table[name]


def row(table: Mapping[str, Any], section: Mapping[str, Any], path: str) -> Any:
    """Look up the row that a section names; ConfigError with the choices when there is no name."""
    if "name" not in section:
        raise ConfigError(f"{path}.name is missing; choose from {', '.join(sorted(table))}")
    return pick(table, section["name"], f"{path}.name")


def with_dtypes(section: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Replace the names of dtypes in a section by the dtypes; ConfigError for an unknown one."""
    return {
        key: pick(DTYPES, value, f"{path}.{key}") if key in ("dtype", "param_dtype") else value
        for key, value in section.items()
    }


def check_range(
    value: int | float, path: str, *, low: int | float, high: int | float = math.inf
) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{path} = {value!r} should be {wanted}")


def options(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section without its `name`, the row of the table that the section picks."""
    return {key: value for key, value in section.items() if key != "name"}


def bind(
    function: Callable, section: Mapping[str, Any], path: str, *, given: Collection[str] = ()
) -> dict[str, Any]:
    """Check a section against a function's signature and return it as keywords for that function.

    `given` names the parameters that the caller supplies itself; a config may not set them. A
    function with **options checks those on its own.
    Raises ConfigError for an unknown key, a wrong type or a missing value, with path, value and
    choices.
    """
    parameters = _parameters(function, given)
    keywords = {}
    for key, value in options(section).items():
        where = f"{path}.{key}"
        if key in parameters:
            keywords[key] = check_type(_plain(value), parameters[key].annotation, where)
        elif _takes_more(function) and key not in given:
            keywords[key] = _plain(value)
        else:
            raise ConfigError(f"{where} = {value!r} is not an option; {_choices(key, parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in keywords:
            wanted = _type_name(parameter.annotation)
            raise ConfigError(f"{path}.{key} is missing; set it to a value of type {wanted}")
    return keywords


def bind_shared(
    section: Mapping[str, Any], path: str, *targets: tuple[Callable, Collection[str]]
) -> list[dict[str, Any]]:
    """Bind one section to several (function, given) pairs: each takes the keys that it knows ->
    their keywords.

    Raises ConfigError as bind does; a key that no function knows is an error.
    """
    known = [_parameters(function, given) for function, given in targets]
    for key, value in options(section).items():
        if not any(key in parameters for parameters in known):
            allowed = {name for parameters in known for name in parameters}
            raise ConfigError(
                f"{path}.{key} = {value!r} is not an option; {_choices(key, allowed)}"
            )
    return [
        bind(function, {k: v for k, v in section.items() if k in parameters}, path, given=given)
        for (function, given), parameters in zip(targets, known, strict=True)
    ]


def value_of(function: Callable, keywords: Mapping[str, Any], name: str) -> Any:
    """Return what a function will see for a parameter: its keyword, or its default."""
    if name in keywords:
        return keywords[name]
    return inspect.signature(function).parameters[name].default


def check_type(value: Any, annotation: Any, path: str) -> Any:
    """Return the value if it is of the annotated type; raise ConfigError naming path, value and
    type if not."""
    if annotation is inspect.Parameter.empty or annotation is Any:
        return value
    is_flag = isinstance(value, bool) and annotation in (int, float)
    if is_flag or not is_bearable(value, annotation, conf=_NUMERIC_TOWER):
        raise ConfigError(f"{path} = {value!r} should be {_type_name(annotation)}")
    if isinstance(value, int) and not is_bearable(value, annotation):
        return float(value)
    return value


def known_sections(
    config: Mapping[str, Any], allowed: Collection[str], path: str = "config"
) -> None:
    """Raise ConfigError for the first key of a config that no reader knows."""
    for key in config:
        if key not in allowed:
            raise ConfigError(f"{path}.{key} is not a section; {_choices(key, allowed)}")


def _parameters(function: Callable, given: Collection[str]) -> dict[str, inspect.Parameter]:
    # linen adds `parent` and `name` to every module's constructor; neither is a hyper-parameter.
    hidden = {"self", "parent", "name", *given}
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in hidden
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }


def _takes_more(function: Callable) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _plain(value: Any) -> Any:
    # Lists come from saved configs; every sequence field of a network is a tuple (hashable for jit
    # and linen).
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _choices(wrong: str, allowed: Collection[str]) -> str:
    close = difflib.get_close_matches(str(wrong), list(allowed), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose from {', '.join(sorted(map(str, allowed)))}"


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(annotation))
    if annotation is type(None):
        return "None"
    if origin is None and isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
