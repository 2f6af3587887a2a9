"""From a section of a config to the keywords of functions, checked before anything runs."""

import difflib
import functools
import importlib
import inspect
import math
import operator
import re
import traceback
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from beartype import BeartypeConf
from beartype.door import is_bearable

from diffusion_jax.experiment.config.own_objects import is_defined_in, is_users_module
from diffusion_jax.experiment.config.ranges import (
    LARGEST,
    LARGEST_INT,
    Range,
    first_outside,
    range_of,
)

# An int where a float is asked for is fine (PEP 484), as it is for every Python function.
_NUMERIC_TOWER = BeartypeConf(is_pep484_tower=True)
_SMALL = "finite and within 32 bits"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


# A function or record that takes keys of a section, and the parameters that a section may not set
# because the caller supplies them.
Target = tuple[Callable, Collection[str]]


class Section(NamedTuple):
    """What a section of a config may hold; binding and `launch.py options` both read it.

    targets: take keys whatever the name is. table: rows that `name` picks; the row takes keys, too,
    but for those in given. extras: more that takes keys, for some names only. default: the name in
    a config that lacks the section. own: what the caller supplies to a user's own object, which
    name may then be as "package.module:Object"; None where there is no such choice.
    """

    path: str
    about: str
    targets: tuple[Target, ...] = ()
    table: Mapping[str, Callable] = {}
    given: Collection[str] = ()
    extras: Mapping[str, tuple[Target, ...]] = {}
    default: str | None = None
    own: Collection[str] | None = None


class Bound(NamedTuple):
    """A section after binding: keywords for the row that it names, its targets and its extras.

    Without a table the name is "".
    """

    name: str
    factory: Callable
    keywords: dict[str, Any]
    own: tuple[dict[str, Any], ...]
    extra: tuple[dict[str, Any], ...]

    def make(self, *args: Any, **given: Any) -> Any:
        """Call the row with its keywords and with what the caller supplies."""
        return self.factory(*args, **given, **self.keywords)


class ConfigError(ValueError):
    """A config that cannot be built; the message names path, value and what would be right."""


def pick(table: Mapping[str, Any], name: Any, path: str) -> Any:
    """Look up a name of a config in a table.

    Raises ConfigError with the choices when the table has no such name.
    """
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{path} = {shown(name)} is unknown; {choices(name, table)}")
    return table[name]


def row(table: Mapping[str, Any], section: Any, path: str, *, own: bool = False) -> Any:
    """Look up the row of a table that a section's `name` picks, or import a user's own object.

    With own, a name such as "package.module:Object" is imported instead of looked up.
    Raises ConfigError with the choices when there is no name or no such row, and when the module
    or the object does not exist.
    """
    check_section(section, path)
    if "name" not in section:
        raise ConfigError(f"{path}.name is missing; choose from {', '.join(sorted(table))}")
    name = section["name"]
    if own and is_own(name):
        return import_object(name, f"{path}.name")
    return pick(table, name, f"{path}.name")


def is_own(name: Any) -> bool:
    """Tell whether a name of a config means a user's own object, "package.module:Object".

    "cifar10:3.0.2" is not: what follows the colon is a version.
    """
    return isinstance(name, str) and bool(re.search(":[^0-9]", name))


def import_object(name: str, path: str) -> Callable:
    """Import a user's own function or class by its name, "package.module:Object".

    Modules are found where Python finds them; the command line adds the current folder.
    Raises ConfigError when the name is malformed, the module is not the user's or cannot be
    imported, or the object is not defined in it or cannot be called.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name):
        raise ConfigError(f"{path} = {name!r} should be written package.module:Object")
    module_name, _, names = name.partition(":")
    if not is_users_module(module_name):
        raise ConfigError(
            f"{path} = {name!r} should be an object of your own: {module_name!r} belongs to Python "
            "or to an installed package, which a config may name only if it requires diffusion-jax"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{path} = {name!r}: cannot import the module {module_name!r} ({error}); it should be "
            "installed, or lie in the folder where the command is started"
        ) from error
    except (Exception, SystemExit) as error:  # a module may raise anything
        *_, last = traceback.extract_tb(error.__traceback__)
        what = " ".join(f"{last.filename}:{last.lineno}: {type(error).__name__}: {error}".split())
        raise ConfigError(f"{path} = {name!r}: the module {module_name!r} fails: {what}") from error
    try:
        found = functools.reduce(getattr, names.split("."), module)
    except AttributeError as error:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(
            f"{path} = {name!r}: the module {module_name!r} has no {names!r}; "
            f"{choices(names, public)}"
        ) from error
    if not callable(found):
        raise ConfigError(f"{path} = {name!r} should be a function or a class, not {found!r}")
    if not is_defined_in(found, module_name):
        raise ConfigError(
            f"{path} = {name!r} should be defined in {module_name!r}, which imports it from "
            f"{found.__module__!r}"
        )
    return found


def check_range(
    value: int | float, path: str, *, low: int | float, high: int | float = math.inf
) -> None:
    """Raise ConfigError unless low <= value <= high."""
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{path} = {value!r} should be {wanted}")


def check_section(section: Any, path: str) -> None:
    """Raise ConfigError unless a section of a config is a mapping of keys to values."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path} = {shown(section)} should be a section with keys of its own")


def bind_each(row: Section, section: Any, example: str) -> dict[str, dict[str, Any]]:
    """Bind the sections of a config that have names of the user's own -> {name: keywords}.

    row: what one of them is, with the path config.X.NAME. example: what a name stands for and one,
    such as "a token, such as toy". ConfigError for none, and as bind_section does.
    """
    path = row.path.removesuffix(".NAME")
    check_section(section, path)
    if not section:
        what, _, name = example.rpartition(" ")
        raise ConfigError(f"{path} = {{}} should name {what} {path}.{name}")
    rows = {name: row._replace(path=f"{path}.{name}") for name in section}
    return {name: bind_section(rows[name], own).own[0] for name, own in section.items()}


def options(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section without its `name`, the row of the table that the section picks."""
    return {key: value for key, value in section.items() if key != "name"}


def bind(
    function: Callable, section: Any, path: str, *, given: Collection[str] = ()
) -> dict[str, Any]:
    """Check a section against a function's signature and return it as keywords for that function.

    `given` names the parameters that the caller supplies itself; a config may not set them. Keys
    that the signature lacks are let through when it ends in **options.
    Raises ConfigError for an unknown key, a wrong type or a missing value, with path, value and
    choices.
    """
    more = {}
    if _takes_more(function):
        known = {*parameters_of(function, given), *given, "name"}
        more = {key: _plain(value) for key, value in section.items() if key not in known}
        section = {key: value for key, value in section.items() if key not in more}
    (keywords,) = bind_shared(section, path, (function, given))
    return keywords | more


def bind_shared(section: Any, path: str, *targets: Target) -> list[dict[str, Any]]:
    """Bind one section to several (function, given) pairs and return the keywords for each.

    Every function takes the keys that it knows; a key that none of them knows is an error.
    Raises ConfigError as bind does.
    """
    check_section(section, path)
    known = [parameters_of(function, given) for function, given in targets]
    allowed = {name for parameters in known for name in parameters}
    for key, value in options(section).items():
        if key not in allowed:
            wrong = f"{path}.{key} = {shown(value)}"
            raise ConfigError(f"{wrong} is not an option; {choices(key, allowed)}")
    return [
        _keywords(function, parameters, section, path)
        for (function, _), parameters in zip(targets, known, strict=True)
    ]


def _keywords(
    function: Callable,
    parameters: Mapping[str, inspect.Parameter],
    section: Mapping[str, Any],
    path: str,
) -> dict[str, Any]:
    keywords = {}
    for key, parameter in parameters.items():
        where, annotation = f"{path}.{key}", parameter.annotation
        if key in section:
            value = _plain(section[key])
            if is_dtype(key, annotation):
                keywords[key] = _dtype(value, parameter.default is None, where)
                continue
            keywords[key] = check_type(value, annotation, where)
            if kinds_of(annotation) & {int, float}:
                _check_numbers(keywords[key], range_of(function, key), where)
    for key, parameter in parameters.items():  # a wrong value raises before a missing one
        if parameter.default is inspect.Parameter.empty and key not in keywords:
            wanted = type_name(parameter.annotation)
            raise ConfigError(f"{path}.{key} is missing; set it to a value of type {wanted}")
    return keywords


def bind_section(spec: Section, section: Any) -> Bound:
    """Bind a section of a config, None when the config lacks it; every key goes where it is known.

    Raises ConfigError for an unknown name or key, a wrong type and a missing value.
    """
    if section is None:
        section = {} if spec.default is None else {"name": spec.default}
    name, factory, targets = "", dict, list(spec.targets)
    if spec.table:
        factory = row(spec.table, section, spec.path, own=spec.own is not None)
        name = section["name"]
        given = spec.own if spec.own is not None and is_own(name) else spec.given
        targets += [(factory, given), *(spec.extras[name] if name in spec.extras else ())]
    found = bind_shared(section, spec.path, *targets)
    own, row_and_extra = found[: len(spec.targets)], found[len(spec.targets) :]
    keywords, *extra = row_and_extra or [{}]
    return Bound(name, factory, keywords, tuple(own), tuple(extra))


def value_of(function: Callable, keywords: Mapping[str, Any], name: str) -> Any:
    """Return what a function will see for a parameter: its keyword, or its default."""
    if name in keywords:
        return keywords[name]
    return _signature(function).parameters[name].default


def check_type(value: Any, annotation: Any, path: str) -> Any:
    """Return the value if it has the annotated type, an int as float where a float is wanted.

    Raises ConfigError naming path, value and type.
    """
    if annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str):
        return value
    plain = plain_type(annotation)
    kinds = kinds_of(plain)
    is_flag = _has_flag(value) and not kinds & {bool, Any}
    if is_flag or _is_no_text(value, plain) or not is_bearable(value, plain, conf=_NUMERIC_TOWER):
        raise ConfigError(f"{path} = {shown(value)} should be {type_name(annotation)}")
    if not isinstance(value, int) or is_bearable(value, plain):
        return value
    if abs(value) > LARGEST:
        raise ConfigError(f"{path} = {shown(value)} should be {_SMALL}")
    return float(value)


def _is_no_text(value: Any, annotation: Any) -> bool:
    """Tell whether a value is a text where none is wanted: "" would pass as a Sequence[int]."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    others = [part for part in parts if typing.get_origin(part) is not Sequence]
    return isinstance(value, str) and not any(is_bearable(value, part) for part in others)


def _check_numbers(value: Any, wanted: Range | None, path: str) -> None:
    """Raise ConfigError for a number, perhaps one of several, that is outside of a range."""
    wrong = None if wanted is None else first_outside(value, wanted)
    if wanted is None or wrong is None:
        return
    words = wanted.in_words()
    if not abs(wrong) <= LARGEST_INT:
        words = ", ".join([*([words] if words else []), _SMALL])
    each = "" if value is wrong else " each"
    raise ConfigError(f"{path} = {shown(value)} should be {words}{each}")


def _dtype(value: Any, optional: bool, path: str) -> Any:
    """Look up a dtype by its name; a dtype is right too, and None where that is the default."""
    known = isinstance(value, type) and value in DTYPES.values()
    return value if known or (value is None and optional) else pick(DTYPES, value, path)


def _has_flag(value: Any) -> bool:
    """Tell whether a value is a bool, or a sequence that holds one."""
    if isinstance(value, tuple | list):
        return any(map(_has_flag, value))
    return isinstance(value, bool)


def known_sections(config: Any, allowed: Collection[str], path: str = "config") -> None:
    """Raise ConfigError for the first key of a config that no reader knows."""
    check_section(config, path)
    for key in config:
        if key not in allowed:
            raise ConfigError(f"{path}.{key} is not a section; {choices(key, allowed)}")


def parameters_of(function: Callable, given: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """Map the names that a config may set of a function or record to their parameters."""
    # linen adds `parent` and `name` to every module's constructor; neither is a hyper-parameter.
    hidden = {"self", "parent", "name", *given}
    return {
        name: parameter
        for name, parameter in _signature(function).parameters.items()
        if name not in hidden
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }


def is_dtype(key: str, annotation: Any) -> bool:
    """Tell whether a parameter is a dtype of JAX, which a config gives by its name."""
    return "dtype" in key and Any in kinds_of(annotation)


def plain_type(annotation: Any) -> Any:
    """Leave out of a type what no config holds: arrays, functions, complex numbers.

    A bool that stands beside a complex number is one way to say "any number", and left out too.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return types.GenericAlias(tuple, tuple(a if a is ... else plain_type(a) for a in arguments))
    if origin not in (typing.Union, types.UnionType):
        return annotation
    unwanted = {complex, *([bool] if complex in arguments else [])}
    plain = [
        plain_type(argument)
        for argument in arguments
        if argument not in unwanted
        and not _module_of(argument).startswith(("jax", "numpy"))
        and typing.get_origin(argument) is not Callable
    ]
    return functools.reduce(operator.or_, plain) if plain else annotation


def kinds_of(annotation: Any) -> set[Any]:
    """List the types inside a type: float and None of `tuple[float, ...] | None`."""
    arguments = [a for a in typing.get_args(annotation) if a is not ...]
    if not arguments or typing.get_origin(annotation) in (Literal, Callable):
        return {typing.get_origin(annotation) or annotation}
    return set().union(*map(kinds_of, arguments))


def _signature(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # annotations that only a type checker can resolve
        return inspect.signature(function)


def _takes_more(function: Callable) -> bool:
    parameters = _signature(function).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _plain(value: Any) -> Any:
    # Lists come from saved configs; every sequence field of a network is a tuple (hashable for jit
    # and linen).
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def shown(value: Any) -> str:
    """Write a value in one line that is not too long."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 200 else f"{text[:200]}..."


def choices(wrong: Any, allowed: Collection[str]) -> str:
    """Say what a wrong name may have meant, and list the names that are allowed."""
    close = difflib.get_close_matches(str(wrong), list(allowed), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose from {', '.join(sorted(map(str, allowed)))}"


def type_name(annotation: Any) -> str:
    """Name a type as a person would write it."""
    origin = typing.get_origin(annotation)
    if origin is tuple:
        parts = ("..." if a is ... else type_name(a) for a in typing.get_args(annotation))
        return f"tuple[{', '.join(parts)}]"
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        plain = plain_type(annotation)
        if typing.get_origin(plain) not in (typing.Union, types.UnionType):
            return type_name(plain)
        return " or ".join(type_name(argument) for argument in typing.get_args(plain))
    if annotation is type(None):
        return "None"
    if origin is None and isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


def _module_of(annotation: Any) -> str:
    return str(getattr(annotation, "__module__", ""))
