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
        lines += _assignment(f"config.{name} = ", section)
    return "\n".join([*lines, "", "    return config", ""])


def _assignment(head: str, section: Any) -> list[str]:
    if not isinstance(section, Mapping):
        return [f"{' ' * INDENT}{head}{literal(section)}"]
    flat = f"{' ' * INDENT}{head}d({_flat(section)})"
    if len(flat) <= WIDTH:
        return [flat]
    inner = _lines("", section, 2 * INDENT, "")
    return [f"{' ' * INDENT}{head}d(", *inner, f"{' ' * INDENT})"]


def _lines(head: str, value: Any, indent: int, tail: str) -> list[str]:
    """Lay out head + value + tail: on one line, with its arguments on one line, or one a line."""
    pad = " " * indent
    flat = f"{pad}{head}{_flat(value)}{tail}"
    if len(flat) <= WIDTH or not isinstance(value, Mapping | tuple) or not value:
        return [flat]
    opening, closing = _brackets(value)
    items = _items(value)
    joined = " " * (indent + INDENT) + ", ".join(f"{key}{_flat(item)}" for key, item in items)
    if len(joined) <= WIDTH and opening == "dict(":
        return [f"{pad}{head}{opening}", joined, f"{pad}{closing}{tail}"]
    # A single argument that is broken itself gets no comma.
    comma = "," if len(items) > 1 or opening != "dict(" else ""
    body = [line for key, item in items for line in _lines(key, item, indent + INDENT, comma)]
    return [f"{pad}{head}{opening}", *body, f"{pad}{closing}{tail}"]


def _items(value: Mapping[str, Any] | tuple[Any, ...]) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and _brackets(value)[0] == "{":
        return [(f"{literal(key)}: ", item) for key, item in value.items()]
    if isinstance(value, Mapping):
        return [(f"{key}=", item) for key, item in value.items()]
    return [("", item) for item in value]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        opening, closing = _brackets(value)
        inner = ", ".join(f"{key}{_flat(item)}" for key, item in _items(value))
        return f"{opening}{inner}{closing}"
    return literal(value)


def _brackets(value: Any) -> tuple[str, str]:
    """dict(...) where every key can be a keyword, else braces; parentheses for a tuple."""
    if isinstance(value, Mapping):
        is_words = all(key.isidentifier() and not keyword.iskeyword(key) for key in value)
        return ("dict(", ")") if is_words else ("{", "}")
    return "(", ")"


def literal(value: Any) -> str:
    """Write a plain value as Python: strings in double quotes, numbers as short as they can be."""
    if isinstance(value, tuple):
        inner = ", ".join(literal(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, str):
        text = repr(value)
        if '"' not in value:
            text = f'"{text[1:-1]}"'.replace("\\'", "'")
        return text
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:_}"
    if isinstance(value, float) and abs(value) == float("inf"):
        return f'float("{value}")'
    return repr(value)
