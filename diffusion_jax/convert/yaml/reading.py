"""Configs in YAML, read so that no key of them can be overlooked."""

import itertools
import math
import os
import pathlib
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

# YAML 1.1 reads 1e-4 as a word; OmegaConf, with which the originals read their configs, does not.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_DOT = re.compile(r"\.")
_RAISE = object()
Kind = type | tuple[type, ...]
NUMBER = (int, float)
# Far above the largest config, far below what fills a memory.
MAX_BYTES, MAX_VALUES, MAX_REFERENCES = 100_000, 20_000, 10
# What a SafeLoader raises for text that is no YAML, or that has a tag with a value of another kind.
_NO_YAML = (yaml.YAMLError, ValueError, AttributeError, KeyError, IndexError, TypeError)
UNKNOWN = "no such option is known here"


class Node(NamedTuple):
    """A mapping of a YAML file and its path; all nodes of a file share the last three fields.

    seen: the paths of the values that were taken. notes: {path: why it has no counterpart}.
    chosen: what the YAML does not say and the converter chose, in sentences.
    """

    path: str
    values: Mapping[str, Any]
    seen: set[str]
    notes: dict[str, str]
    chosen: list[str]

    def at(self, key: str) -> str:
        """Give the path of a key."""
        return f"{self.path}.{key}" if self.path else key

    def has(self, key: str) -> bool:
        """Tell whether the key is there and not null."""
        return key in self.values and self.values[key] is not None

    def need(self, *keys: str) -> None:
        """Raise ValueError for the first of these keys that is missing or null."""
        for key in keys:
            if not self.has(key):
                raise ValueError(f"{self.at(key)} is missing from the YAML")

    def peek(self, key: str, default: Any = None) -> Any:
        """Look at a value without taking it; lists are tuples, missing and null are the default."""
        return _plain(self.values[key]) if self.has(key) else default

    def take(self, key: str, default: Any = _RAISE, kind: Kind = object) -> Any:
        """Look at a value as `peek` does, and remember that it was converted.

        Raises ValueError when the key is missing and has no default, or is of another kind.
        """
        if default is _RAISE:
            self.need(key)
        self.seen.add(self.at(key))
        value = self.peek(key, default)
        is_flag = isinstance(value, bool) and kind in (int, NUMBER)
        if self.has(key) and (not isinstance(value, kind) or is_flag):
            raise ValueError(f"{self.at(key)} = {value!r} should be {_name(kind)}")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{self.at(key)} = nan should be a number")
        return value

    def note(self, key: str, reason: str) -> None:
        """Say why a key, with everything below it, has no counterpart; nothing if it is absent."""
        if key in self.values:
            self.notes[self.at(key)] = reason

    def child(self, key: str) -> "Node":
        """Open a mapping; one that is missing or null is empty. ValueError for anything else."""
        values = self.peek(key, {})
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{self.at(key)} = {self.values[key]!r} should be a mapping of options"
            )
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
            self._replace(path=path, values=value) for path, value in _inner(self.at(key), values)
        ]

    def class_name(self, default: str = "") -> str:
        """Look at the class that `target` names, without its module and without taking it."""
        name = self.peek("target", default)
        if not isinstance(name, str):
            raise ValueError(f"{self.at('target')} = {name!r} should be the name of a class")
        return name.rpartition(".")[2]

    def target(self, default: str = "") -> str:
        """Take the class that `target` names, without its module."""
        self.take("target", None)
        return self.class_name(default)

    def expect(self, name: str, reason: str) -> bool:
        """Tell whether `target` is absent or names this class; note another one, {} in reason."""
        found = self.target(name)
        if found != name:
            self.note("target", reason.format(found))
        return found == name


def read_yaml(path: str | os.PathLike) -> Node:
    """Read a YAML file and resolve its references ${a.b.c}.

    Raises FileNotFoundError, and ValueError for text that is no YAML, no mapping, names a key
    twice, refers to something that is not there, or is larger than any config.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"the YAML file {path} does not exist")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} should be a config, and has more than {MAX_BYTES:,} bytes")
    try:
        # A SafeLoader makes plain values only.
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except _NO_YAML as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as YAML: it is nested too deeply") from error
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"{path} should hold a mapping with the key model, not {reprlib.repr(tree)}"
        )
    try:
        return root_node(_resolve(tree, tree, str(path), (), itertools.count()))
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as YAML: it is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses keys that stand twice, and merges that unfold for ever."""

    merged = 0

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping; raise ConstructorError for a key that stands twice."""
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [name for name, count in names.items() if count > 1 and name != "<<"]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r:.80} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        """Merge what `<<` names; raise ConstructorError when that is more than any config has."""
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"`<<` unfolds to more than {MAX_VALUES:,} values", node.start_mark
            )


def root_node(values: Mapping[str, Any]) -> Node:
    """Make the node of a whole file."""
    return Node("", values, set(), {}, [])


def leftovers(root: Node) -> Iterator[tuple[str, str]]:
    """List (path, reason) of all that was not converted, in the order of the file.

    Where nothing was taken below a path, only that path is listed. The reason is its note, else
    UNKNOWN.
    """
    above = {
        path[: dot.start()] for path in root.seen | root.notes.keys() for dot in _DOT.finditer(path)
    }
    return _leftovers("", root.values, root, above)


def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """List (path, value) of everything that is no mapping and no list of mappings."""
    inner = _inner(path, value)
    if not inner:
        yield path, value
    for place, item in inner:
        yield from leaves(place, item)


def _leftovers(
    path: str, value: Any, root: Node, above: Collection[str]
) -> Iterator[tuple[str, str]]:
    if path in root.notes:
        yield path, root.notes[path]
    elif path in root.seen:
        return
    elif path and path not in above:
        yield path, UNKNOWN
    else:
        for place, item in _inner(path, value):
            yield from _leftovers(place, item, root, above)


def _inner(path: str, value: Any) -> list[tuple[str, Any]]:
    """List (path, item) of the items of a mapping, or of a list that holds mappings."""
    if isinstance(value, Mapping):
        return [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return [(f"{path}.{i}", item) for i, item in enumerate(value)]
    return []


def _name(kind: Kind) -> str:
    return " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))


def _plain(value: Any) -> Any:
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _resolve(
    value: Any, tree: Any, path: str, within: tuple[str, ...], count: Iterator[int]
) -> Any:
    """Replace ${a.b.c} by what stands there and read 1e-4 as a number, as OmegaConf does."""
    if next(count) > MAX_VALUES:
        raise ValueError(
            f"{path} should be a config, and unfolds to more than {MAX_VALUES:,} values"
        )
    if isinstance(value, Mapping):
        return {str(key): _resolve(item, tree, path, within, count) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, tree, path, within, count) for item in value]
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(
            f"{path} should be a config, and holds a number of {value.bit_length()} bits"
        )
    if not isinstance(value, str):
        return value
    if value.count("${") > MAX_REFERENCES:
        raise ValueError(f"{path} has a text with more than {MAX_REFERENCES} references ${{...}}")
    if _EXPONENT.fullmatch(value):
        return float(value)
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _look_up(whole[1].strip(), tree, path, within, count)
    return _REFERENCE.sub(lambda m: str(_look_up(m[1].strip(), tree, path, within, count)), value)


def _look_up(
    reference: str, tree: Any, path: str, within: tuple[str, ...], count: Iterator[int]
) -> Any:
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
    return _resolve(found, tree, path, (*within, reference), count)
