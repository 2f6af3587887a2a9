"""Sections of a config as the text of a config file, laid out as ruff does."""

import keyword
from collections.abc import Mapping
from typing import Any

WIDTH = 100
INDENT = 4
# Sections before which an empty line stands.
_PARAGRAPHS = ("data", "optimizer", "train")


def config_source(docstring: str, sections: Mapping[str, Any]) -> str:
    """Write a config file with get_config(variant=""): one assignment for each section.

    A section is a mapping of plain values, or a value. The docstring is wrapped already.
    """
    lines = [f'"""{docstring}\n"""', "", "import ml_collections", "", ""]
    lines += [
        'def get_config(variant: str = "") -> ml_collections.ConfigDict:',
        "    if variant:",
        '        raise ValueError(f"variant {variant!r} is unknown; this config has none")',
        "    d = ml_collections.ConfigDict",
        "    config = d()",
    ]
    for name, section in sections.items():
        lines += [""] if name in _PARAGRAPHS else []
        is_section = isinstance(section, Mapping)
        text = f"d({literal(section)})" if is_section else literal(section)
        line = f"{' ' * INDENT}config.{name} = {text}"
        if is_section and len(line) > WIDTH:
            inner = _lines("", section, 2 * INDENT, "")
            lines += [f"{' ' * INDENT}config.{name} = d(", *inner, f"{' ' * INDENT})"]
        else:
            lines.append(line)
    return "\n".join([*lines, "", "    return config", ""])


def _lines(head: str, value: Any, indent: int, tail: str) -> list[str]:
    """Lay out head + value + tail: on one line, with its arguments on one line, or one a line."""
    pad = " " * indent
    flat = f"{pad}{head}{literal(value)}{tail}"
    if len(flat) <= WIDTH or not isinstance(value, Mapping | tuple) or not value:
        return [flat]
    opening, items, closing = _take_apart(value)
    joined = " " * (indent + INDENT) + ", ".join(key + literal(item) for key, item in items)
    if len(joined) <= WIDTH and opening == "dict(":
        return [f"{pad}{head}{opening}", joined, f"{pad}{closing}{tail}"]
    # A single argument that is broken itself gets no comma.
    comma = "," if len(items) > 1 or opening != "dict(" else ""
    body = [line for key, item in items for line in _lines(key, item, indent + INDENT, comma)]
    return [f"{pad}{head}{opening}", *body, f"{pad}{closing}{tail}"]


def _take_apart(value: Mapping[str, Any] | tuple[Any, ...]) -> tuple[str, list, str]:
    """List what comes before the items, (what comes before an item, item), and the end."""
    if isinstance(value, tuple):
        return "(", [("", item) for item in value], ")"
    if all(key.isidentifier() and not keyword.iskeyword(key) for key in value):
        return "dict(", [(f"{key}=", item) for key, item in value.items()], ")"
    return "{", [(f"{literal(key)}: ", item) for key, item in value.items()], "}"


def literal(value: Any) -> str:
    """Write a plain value as Python: strings in double quotes, numbers as short as they can be."""
    if isinstance(value, Mapping | tuple):
        opening, items, closing = _take_apart(value)
        comma = "," if opening == "(" and len(items) == 1 else ""
        return opening + ", ".join(key + literal(item) for key, item in items) + comma + closing
    if isinstance(value, str):
        text = repr(value)
        return text if '"' in value else f'"{text[1:-1]}"'.replace("\\'", "'")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    if isinstance(value, float) and abs(value) == float("inf"):
        return f'float("{value}")'
    return repr(value)
