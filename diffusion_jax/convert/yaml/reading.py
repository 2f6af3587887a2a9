"""Configs in YAML, read so that no key of them can be overlooked."""

import copy
import os
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

# YAML 1.1 takes 1e-4 for a word; OmegaConf, with which the originals read their configs, does not.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_DOT = re.compile(r"\.")
_RAISE = object()
Kind = type | tuple[type, ...]
NUMBER = (int, float)
UNKNOWN = "no such option is known here"


class Node(NamedTuple):
    """A mapping of a YAML file, and its path there.

    seen: paths of the values that were taken; notes: path -> why it has no counterpart. Both are
    shared by all nodes of a file.
    """

    path: str
    values: Mapping[str, Any]
    seen: set[str]
    notes: dict[str, str]

    def at(self, key: str | int) -> str:
        """Give the path of a key."""
        return f"{self.path}.{key}" if self.path else str(key)

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return key in self.values and self.values[key] is not None

    def take(self, key: str, default: Any = _RAISE, kind: Kind = object) -> Any:
        """Take a value, lists as tuples; a key that is missing or null is its default.

        Raises ValueError when the key is missing and has no default, or is of another kind.
        """
        self.seen.add(self.at(key))
        if self.has(key):
            value = _plain(self.values[key])
            if not isinstance(value, kind):
                raise ValueError(f"{self.at(key)} = {value!r} should be {_name(kind)}")
            return value
        if default is _RAISE:
            raise ValueError(f"{self.at(key)} is missing from the YAML")
        return default

    def peek(self, key: str, default: Any = None) -> Any:
        """Look at a value without taking it."""
        return _plain(self.values[key]) if self.has(key) else default

    def note(self, key: str | int, reason: str) -> None:
        """Say why a key, with all below it, has no counterpart; for a key that is there."""
        if key in self.values or isinstance(key, int):
            self.notes[self.at(key)] = reason

    def child(self, key: str) -> "Node":
        """Open a mapping; one that is missing or null is empty. ValueError for anything else."""
        values = self.values[key] if self.has(key) else {}
        if not isinstance(values, Mapping):
            raise ValueError(f"{self.at(key)} = {values!r} should be a mapping of options")
        if not values:
            self.seen.add(self.at(key))
        return self._replace(path=self.at(key), values=values)

    def children(self, key: str) -> "list[Node]":
        """Open a list of mappings, each with its number in the path."""
        values = self.values[key] if self.has(key) else []
        if not isinstance(values, Sequence) or not all(isinstance(v, Mapping) for v in values):
            raise ValueError(f"{self.at(key)} should be a list of mappings")
        if not values:
            self.seen.add(self.at(key))
        return [
            self._replace(path=f"{self.at(key)}.{i}", values=value)
            for i, value in enumerate(values)
        ]

    def target(self, default: str = "") -> str:
        """Take the class that `target` names, without its module."""
        name = self.take("target", default)
        if not isinstance(name, str):
            raise ValueError(f"{self.at('target')} = {name!r} should be the name of a class")
        return name.rpartition(".")[2]


def read_yaml(path: str | os.PathLike) -> Node:
    """Read a YAML file and resolve its references ${a.b.c}.

    Raises FileNotFoundError, and ValueError for text that is no YAML, no mapping, or refers to
    something that is not there.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"the YAML file {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} should hold a mapping with the key model, not {tree!r:.80}")
    return Node("", _resolve(_numbers(tree), tree, str(path), ()), set(), {})


def leftovers(root: Node) -> Iterator[tuple[str, str]]:
    """Find what nothing took: (path, reason), the highest path below which nothing was taken.

    In the order of the file; a reason is that of a note, or that the option is unknown.
    """
    above = {
        path[: dot.start()] for path in root.seen | root.notes.keys() for dot in _DOT.finditer(path)
    }
    yield from _leftovers("", root.values, root, above)


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """List (path, value) of all that is no mapping and no list of mappings."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(f"{path}.{key}" if path else str(key), item)
    elif _has_mappings(value):
        for i, item in enumerate(value):
            yield from leaves(f"{path}.{i}", item)
    else:
        yield path, value


def _leftovers(
    path: str, value: Any, root: Node, above: Collection[str]
) -> Iterator[tuple[str, str]]:
    if path in root.notes:
        yield path, root.notes[path]
        return
    if path in root.seen:
        return
    if path and path not in above:
        yield path, UNKNOWN
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leftovers(f"{path}.{key}" if path else str(key), item, root, above)
    elif _has_mappings(value):
        for i, item in enumerate(value):
            yield from _leftovers(f"{path}.{i}", item, root, above)


def _name(kind: Kind) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def _has_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value)


def _plain(value: Any) -> Any:
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    is_number = isinstance(value, str) and _EXPONENT.fullmatch(value)
    return float(value) if is_number else value


def _resolve(value: Any, tree: Any, path: str, within: tuple[str, ...]) -> Any:
    """Replace ${a.b.c} by what stands there, as OmegaConf does."""
    if isinstance(value, Mapping):
        return {key: _resolve(item, tree, path, within) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, tree, path, within) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _look_up(whole[1].strip(), tree, path, within)
    return _REFERENCE.sub(lambda m: str(_look_up(m[1].strip(), tree, path, within)), value)


def _look_up(reference: str, tree: Any, path: str, within: tuple[str, ...]) -> Any:
    if reference in within:
        raise ValueError(f"{path}: ${{{reference}}} refers to itself")
    found = tree
    for part in reference.split("."):
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, Mapping) and part in found:
            found = found[part]
        else:
            raise ValueError(f"{path}: ${{{reference}}} refers to a key that is not in the file")
    return _resolve(_numbers(copy.deepcopy(found)), tree, path, (*within, reference))
