"""A config as data: JSON that keeps tuples, references and placeholders, and never runs anything.

A section is an object. What JSON lacks is an object with one key that starts with a dollar sign:
{"$tuple": [...]}, {"$dict": {...}} inside a list, {"$float": "nan"}, {"$none": "int"} for a
placeholder, {"$same": "train.num_steps"} for a reference, and {"$ops": [["mul", 2]], "$of": ...}
for a value that is computed from others.
"""

import functools
import json
import logging
import math
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import FieldReference, placeholder

from diffusion_jax.experiment.config.binding import ConfigError

_log = logging.getLogger(__name__)
# Limits for files of other people.
_MAX_BYTES = 1 << 24
_MAX_NUMBER = 1e300
_MAX_TEXT = 10_000
_TYPES = {kind.__name__: kind for kind in (int, float, str, bool, tuple, list, dict, object)}
_OPS = {"add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "abs"}
_NAMES: dict[Any, str] = {getattr(operator, name): name for name in _OPS}
_REVERSED = {"add", "sub", "mul"}
_METHODS: dict[str, Callable[..., FieldReference]] = {
    "identity": FieldReference.identity,
    **{name: getattr(FieldReference, f"__{name}__") for name in _OPS},
    **{f"r{name}": getattr(FieldReference, f"__r{name}__") for name in _REVERSED},
    **{f"to_{name}": getattr(FieldReference, f"to_{name}") for name in ("int", "float", "str")},
}


def to_data(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Turn a config into values that JSON can hold; `from_data` gives the same config again.

    Raises ConfigError for a value that is no literal.
    """
    return _section(config, "", _places(config, "", {}))


def from_data(data: Any, where: str) -> ml_collections.ConfigDict:
    """Make the config that to_data was given; ConfigError, naming `where`, for anything else."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} holds no config: {type(data).__name__} should be an object")
    try:
        return _config(data)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ConfigError(f"{where} holds no config: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{where} holds no config: {error}") from error


def write_json(path: pathlib.Path, data: Any) -> None:
    """Write a JSON file so that a crash leaves the old one or the new one, and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json_text(data) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read an object from a JSON file; ConfigError, naming the file, for anything else."""
    with path.open("rb") as file:
        return parse_json(file.read(_MAX_BYTES + 1), str(path))


def json_text(data: Any) -> str:
    """Write data as JSON that stays the same whenever the data do."""
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False)


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Read an object from a text of JSON; ConfigError, naming where, for anything else."""
    try:
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is empty, cut or no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds {type(data).__name__} and should hold an object")
    return data


def _places(section: Any, path: str, found: dict[int, str]) -> dict[int, str]:
    """Map the id of each section and reference to the first path where it stands."""
    for key, value in section.items(preserve_field_references=True):
        kinds = (FieldReference, ml_collections.ConfigDict)
        if isinstance(value, kinds) and id(value) not in found:
            found[id(value)] = f"{path}.{key}" if path else str(key)
            if isinstance(value, ml_collections.ConfigDict):
                _places(value, found[id(value)], found)
    return found


def _section(section: Any, path: str, places: Mapping[int, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items(preserve_field_references=True):
        where = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str) or key.startswith("$") or "." in key:
            raise ConfigError(f"config.{where}: the key {key!r} should be a text without $ and .")
        if id(value) in places and places[id(value)] != where:
            found[key] = {"$same": places[id(value)]}
        elif isinstance(value, ml_collections.ConfigDict):
            found[key] = _section(value, where, places)
        else:
            found[key] = _expression(value, where, places)
        if found[key] is None and value is not None:
            _log.warning("config.%s is computed by a function; its value alone is saved", where)
            found[key] = _literal(section[key], where)
    return found


def _expression(value: Any, where: str, places: Mapping[int, str]) -> Any:
    """Describe how a reference gets its value; None for an operation without a name here."""
    if not isinstance(value, FieldReference):
        return _literal(value, where)
    if id(value) in places and places[id(value)] != where:
        return {"$same": places[id(value)]}
    inner, ops = value._value, []
    for op in value._ops:
        name = _name(op.fn)
        if name in ("to_int", "to_float", "to_str"):  # its only argument is what it casts
            inner, arguments = op.args[0], []
        else:
            arguments = [*(op.fn.args if _is_reversed(op.fn) else ()), *op.args]
        described = [_expression(argument, where, places) for argument in arguments]
        if name is None or None in described:
            return None
        ops.append([name, *described])
    if isinstance(inner, FieldReference) or ops:
        described = _expression(inner, where, places)
        return None if described is None else {"$of": described, "$ops": ops}
    return {"$none": value.get_type().__name__} if inner is None else _literal(inner, where)


def _is_reversed(function: Any) -> bool:
    return isinstance(function, functools.partial)


def _name(function: Any) -> str | None:
    if _is_reversed(function):
        name = _NAMES[function.func] if function.func in _NAMES else None
        return f"r{name}" if name in _REVERSED else None
    if function in _NAMES:
        return _NAMES[function]
    name = getattr(function, "__qualname__", "")
    if name == "FieldReference.identity.<locals>.<lambda>":
        return "identity"
    if name == "FieldReference._apply_cast_op.<locals>.<lambda>":
        kind = f"to_{function.__closure__[0].cell_contents.__name__}"
        return kind if kind in _METHODS else None
    return None


def _literal(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, (tuple, list)):
        items = [_literal(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, (Mapping, ml_collections.ConfigDict)):
        return {"$dict": {str(k): _literal(v, f"{where}.{k}") for k, v in value.items()}}
    raise ConfigError(
        f"config.{where} = {value!r} should be a number, a text, None, or a tuple or section of "
        "these: a run keeps its config as data"
    )


def _config(data: Mapping[str, Any]) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    waiting = dict(_fill(config, data, ""))

    def settle(path: str) -> None:
        section, key, value = waiting.pop(path)
        section[key] = same(value["$same"]) if "$same" in value else computed(value)

    def same(path: str) -> Any:
        if path in waiting:
            settle(path)
        *parents, key = path.split(".")
        section = functools.reduce(operator.getitem, parents, config)
        found = section[key]
        return found if isinstance(found, ml_collections.ConfigDict) else section.get_ref(key)

    def computed(value: Any) -> Any:
        if not isinstance(value, dict) or not {"$same", "$of"} & set(value):
            return _value(value)
        if "$same" in value:
            return same(value["$same"])
        found = computed(value["$of"])
        found = found if isinstance(found, FieldReference) else FieldReference(found)
        for name, *arguments in value["$ops"]:
            arguments = [computed(argument) for argument in arguments]
            _check_operation(name, [found, *arguments])
            found = _METHODS[name](found, *arguments)
        return found

    while waiting:
        settle(next(iter(waiting)))
    return config


def _fill(
    section: ml_collections.ConfigDict, data: Mapping[str, Any], path: str
) -> Iterator[tuple[str, tuple[ml_collections.ConfigDict, str, Any]]]:
    """Set all plain values of a section, and yield the path of every reference."""
    for key, value in data.items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, dict) and {"$same", "$of"} & set(value):
            yield where, (section, key, value)
        elif isinstance(value, dict) and not any(name.startswith("$") for name in value):
            section[key] = ml_collections.ConfigDict()
            yield from _fill(section[key], value, where)
        else:
            section[key] = _value(value)


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return [_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, inner),) = value.items()
    if tag == "$tuple":
        return tuple(_value(item) for item in inner)
    if tag == "$dict":
        return {key: _value(item) for key, item in inner.items()}
    if tag == "$float":
        return float(inner)
    if tag == "$none":
        return placeholder(_TYPES[inner])
    raise ValueError(f"{tag} is unknown")


def _check_operation(name: str, operands: list[Any]) -> None:
    """Raise ValueError for what a file of another person could make huge."""
    values = [value.get() if isinstance(value, FieldReference) else value for value in operands]
    texts = name in ("identity", "add", "to_int", "to_float", "to_str")
    for value in values:
        number = isinstance(value, (int, float)) and not abs(value) > _MAX_NUMBER
        text = texts and isinstance(value, str) and len(value) <= _MAX_TEXT
        if not (value is None or number or text):
            raise ValueError(f"the operation {name} cannot be done with {str(value)[:40]!r}")
