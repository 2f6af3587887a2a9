"""How one section of a YAML config becomes one of ours: a table row for each of its keys."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion_jax.convert.yaml.reading import Node

_ABSENT = object()


class Key(NamedTuple):
    """The option has a counterpart: its name here, and the original's default where ours is
    another one (it is written when the YAML does not say)."""

    name: str
    default: Any = _ABSENT


class Only(NamedTuple):
    """These values say what happens here anyway; others have no counterpart, for a reason."""

    values: tuple[Any, ...]
    reason: str


class Drop(NamedTuple):
    """The option has no counterpart, for a reason."""

    reason: str


Row = Key | Only | Drop
Table = Mapping[str, Row]


class Class(NamedTuple):
    """A class of the originals: the name of its row here, and its options."""

    name: str
    options: Table = {}


def convert_options(node: Node, table: Table) -> dict[str, Any]:
    """Convert the options of a node that the table lists; what it does not list stays untaken."""
    found: dict[str, Any] = {}
    for key, row in table.items():
        if isinstance(row, Key):
            if node.has(key):
                found[row.name] = node.take(key)
            else:
                node.take(key, None)
                if row.default is not _ABSENT:
                    found[row.name] = row.default
        elif isinstance(row, Only) and node.peek(key) in (None, *row.values):
            node.take(key, None)
        elif key in node.values:
            node.note(key, row.reason)
    return found


def convert_class(node: Node, table: Mapping[str, Class], what: str) -> dict[str, Any] | None:
    """Convert {target, params} to {"name": ..., **options}; None for a class that has no row.

    what: "sampler" and the like, for the reason that is noted then.
    """
    name = node.target()
    if name not in table:
        node.seen.discard(node.at("target"))
        node.note("target", f"{name} is no {what} of ours; there are {', '.join(table)}")
        return None
    return {"name": table[name].name} | convert_options(node.child("params"), table[name].options)
