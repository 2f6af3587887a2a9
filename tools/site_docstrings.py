"""An extension of griffe that reads this package's docstrings for the site.

Docstrings are plain text: what Markdown would read as a link or as emphasis, such as a shape
`[b h w c]` or a product, is escaped. Lines `name: text` about parameters or fields, with
indented lines after them, become a section as Google's convention has it, and so do lines that
describe several, `a, b: text`.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

import griffe

_NAMED = re.compile(r"(\s*)(\w+(?:, \w+)*): (.*)")
_SECTIONS = ("Args:", "Attributes:")


class PlainText(griffe.Extension):
    """Rewrite every docstring before its sections are found."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is None:
            return
        section, names = "", set()
        if isinstance(obj, griffe.Function):
            section, names = "Args:", {parameter.name for parameter in obj.parameters}
        elif isinstance(obj, griffe.Class):
            section, names = "Attributes:", set(obj.members)
        obj.docstring.value = escape("\n".join(with_sections(obj.docstring.value, section, names)))


def with_sections(text: str, section: str, names: Collection[str]) -> Iterator[str]:
    """Put lines about known names under a section's title, one name an entry."""
    is_open, in_entry = False, False
    for line in text.splitlines():
        found = _NAMED.fullmatch(line)
        described = found[2].split(", ") if found else []
        if line in _SECTIONS:
            is_open, in_entry = True, False
            yield line
        elif found and described and set(described) <= set(names) and (is_open or not found[1]):
            if not is_open:
                yield from ("", section)
            is_open = in_entry = True
            yield from _entries(described, found[3])
        elif in_entry and line.startswith(" "):
            yield f"        {line.strip()}"
        else:
            if is_open and line.strip():
                yield ""
                is_open = False
            in_entry = False
            yield re.sub(r"^Returns: (?=.)", "Returns ", line)


def _entries(names: list[str], text: str) -> Iterator[str]:
    first, *others = names
    for name in others:
        yield f"    {name}: See `{first}`."
    yield f"    {first}: {text}"


def escape(text: str) -> str:
    """Put a backslash before [, ] and *, but not inside backticks or in doctests."""
    lines = []
    for line in text.splitlines():
        parts = re.split(r"(`[^`]*`)", line)
        if not line.lstrip().startswith((">>>", "...")):
            parts[::2] = [re.sub(r"([\[\]*])", r"\\\1", part) for part in parts[::2]]
        lines.append("".join(parts))
    return "\n".join(lines)
