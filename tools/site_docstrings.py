"""An extension of griffe: docstrings are plain text, so what Markdown would read as a link or as
emphasis, such as a shape `[b h w c]` or a product, is escaped; code in backticks stays."""

import re
from typing import Any

import griffe


class PlainText(griffe.Extension):
    """Escape brackets and asterisks in every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = escape(obj.docstring.value)


def escape(text: str) -> str:
    """Put a backslash before [, ] and *, but not inside backticks or in doctests."""
    lines = []
    for line in text.splitlines():
        parts = re.split(r"(`[^`]*`)", line)
        if not line.lstrip().startswith((">>>", "...")):
            parts[::2] = [re.sub(r"([\[\]*])", r"\\\1", part) for part in parts[::2]]
        lines.append("".join(parts))
    return "\n".join(lines)
