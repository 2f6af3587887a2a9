"""How one section of a YAML config becomes one of ours: a table row for each of its keys."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml.reading import Node

_ABSENT = object()


class As(NamedTuple):
    """The option has a counterpart, with this name.

    default: the original's default, written where the YAML has no value; given where our default
    is different.
    """

    name: str
    default: Any = _ABSENT


class Only(NamedTuple):
    """These values ask for what happens here anyway; others have no counterpart, for a reason."""

    values: tuple[Any, ...]
    reason: str


class Drop(NamedTuple):
    """The option has no counterpart, for a reason."""

    reason: str


Row = As | Only | Drop
Table = Mapping[str, Row]


class Class(NamedTuple):
    """A class of the originals: the name of its row here, and its options."""

    name: str
    options: Table = {}


def keep(names: str = "", /, **defaults: Any) -> dict[str, As]:
    """Make rows of options that keep their names, the keyword ones with a default (see As)."""
    return {name: As(name) for name in names.split()} | {
        name: As(name, default) for name, default in defaults.items()
    }


def drop(names: str, reason: str) -> dict[str, Drop]:
    """Make rows of options that have no counterpart for one reason."""
    return dict.fromkeys(names.split(), Drop(reason))


def convert_options(node: Node, table: Table) -> dict[str, Any]:
    """Convert the options of a node that the table lists, and take no others."""
    found: dict[str, Any] = {}
    for key, row in table.items():
        if isinstance(row, As):
            value = node.take(key, row.default)
            if value is not _ABSENT:
                found[row.name] = value
        elif isinstance(row, Only) and node.peek(key) in (None, *row.values):
            node.take(key, None)
        else:
            node.note(key, row.reason)
    return found


def convert_class(node: Node, table: Mapping[str, Class], what: str) -> dict[str, Any] | None:
    """Convert {target, params} to {"name": ..., **options}; None for a class that has no row.

    what: "sampler" and the like, for the reason that is noted then.
    """
    name = node.class_name()
    if name not in table:
        node.note("target", f"{name} is no {what} of ours; there are {', '.join(table)}")
        return None
    node.target()
    return {"name": table[name].name} | convert_options(node.child("params"), table[name].options)
