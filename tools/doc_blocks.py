"""The code blocks of a Markdown page, each with the rule by which `make docs` runs it.

A rule is an HTML comment on the line before a block:

    <!-- docs: tiny -->                    configs/x.py becomes configs/x.py:tiny, and
                                           load_config("x") load_config("x:tiny")
    <!-- docs: tiny, without --a, with --b=1, exit 2 -->
    <!-- docs: skip because it needs a TPU -->
    <!-- docs: output -->                  lines of this block are in the output of the last one
"""

import re
from pathlib import Path
from typing import NamedTuple

RUN = ("sh", "python")
# Blocks in these languages are shown and not run.
SHOWN = ("text", "yaml", "toml", "json", "mermaid", "bibtex")
_RULE = re.compile(r"<!-- docs: (.*) -->")


class Block(NamedTuple):
    """One fenced block: its page, first line, language, text and rule.

    with_ and without are arguments to add to, or take from, each command; exit_code is the
    expected one. skip holds the reason; output is the text that the block has to print.
    """

    page: str
    line: int
    language: str
    text: str
    tiny: bool = False
    without: tuple[str, ...] = ()
    with_: tuple[str, ...] = ()
    exit_code: int = 0
    skip: str = ""
    is_output: bool = False
    output: str = ""

    @property
    def place(self) -> str:
        """page:line, as editors understand it."""
        return f"{self.page}:{self.line}"


def read_blocks(page: Path, root: Path) -> list[Block]:
    """Return the blocks of a page in order; an output block goes to the block before it.

    Raises ValueError for a block without a known language and for a rule that cannot be read.
    """
    name = str(page.relative_to(root))
    blocks: list[Block] = []
    rule, opened, text = "", None, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if opened is None:
            fence = re.fullmatch(r"```(.*)", line)
            if fence:
                opened = _open(name, number, fence[1], rule)
                rule, text = "", []
            elif line.strip():
                rule = _rule(line)
        elif line == "```":
            block = opened._replace(text="\n".join(text) + "\n")
            opened = None
            if not block.is_output:
                blocks.append(block)
            elif not blocks or blocks[-1].language not in RUN:
                raise ValueError(f"{block.place} is the output of no block")
            else:
                blocks[-1] = blocks[-1]._replace(output=block.text)
        else:
            text.append(line)
    if opened is not None:
        raise ValueError(f"{opened.place} opens a block that nothing closes")
    return blocks


def _rule(line: str) -> str:
    found = _RULE.fullmatch(line)
    if line.lstrip().startswith("<!-- docs") and not found:
        raise ValueError(f"{line!r} should be <!-- docs: RULE -->")
    return found[1] if found else ""


def _open(page: str, line: int, language: str, rule: str) -> Block:
    block = Block(page, line, language, "")
    if language not in (*RUN, *SHOWN):
        raise ValueError(
            f"{block.place}: language = {language!r} is unknown; choose from "
            + ", ".join((*RUN, *SHOWN))
        )
    if rule == "output":
        return block._replace(is_output=True)
    if rule.startswith("skip"):
        reason = rule.removeprefix("skip because ")
        if reason == rule or not reason.strip():
            raise ValueError(f"{block.place}: {rule!r} should be 'skip because REASON'")
        return block._replace(skip=reason)
    for part in filter(None, re.split(r",\s+", rule)):
        word, _, value = part.partition(" ")
        if word == "tiny" and not value:
            block = block._replace(tiny=True)
        elif word == "without" and value:
            block = block._replace(without=(*block.without, value))
        elif word == "with" and value:
            block = block._replace(with_=(*block.with_, value))
        elif word == "exit" and value.isdigit():
            block = block._replace(exit_code=int(value))
        else:
            raise ValueError(
                f"{block.place}: rule = {part!r} is unknown; choose from tiny, without FLAG, "
                "with FLAG, exit CODE, output, skip because REASON"
            )
    return block


def commands(block: Block) -> list[str]:
    """Split an sh block into commands as run: continued lines joined, comments left out."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    found = [re.sub(r"\s+#.*", "", line) for line in joined.splitlines()]
    return [shrink(line, block) for line in found if line.strip() and line[0] != "#"]


def shrink(text: str, block: Block) -> str:
    """Apply a block's rule to a command or to Python code."""
    if block.tiny:
        text = re.sub(r"configs/(\w+)\.py(?![:\w])", r"configs/\1.py:tiny", text)
        text = re.sub(r'load_config\("(\w+)"', r'load_config("\1:tiny"', text)
    for flag in block.without:
        text = re.sub(rf"\s{re.escape(flag)}(=('[^']*'|\"[^\"]*\"|\S+))?(?=\s|$)", "", text)
    return " ".join([text, *block.with_]) if block.language == "sh" else text
