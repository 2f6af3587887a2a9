"""The documents: links and paths lead somewhere, blocks have rules, and make docs sees lies."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.experiment.config.catalogue import sections
from diffusion_jax.experiment.sampling import SAMPLERS

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCUMENTS = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (
    "benchmarks",
    "configs",
    "deploy",
    "diffusion_jax",
    "docs",
    "notebooks",
    "tests",
    "tools",
)
# Named as what a user may write, or as a file in a run's folder.
INVENTED = {"configs/mine.py", "configs/x.py", "configs/config.py"}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@pytest.fixture
def doc_blocks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("doc_blocks")


@pytest.fixture
def run_docs(monkeypatch, doc_blocks):
    return importlib.import_module("run_docs")


def prose(document: Path) -> str:
    return re.sub(r"```.*?\n```", "", document.read_text(), flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@each_document
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", prose(document))
    missing = []
    for target, anchor in links:
        if "://" in target:
            continue
        page = document.parent / target if target else document
        if not page.exists() or (anchor and anchor not in anchors(page)):
            missing.append(f"{target}#{anchor}")
    assert not missing


@each_document
def test_paths_lead_somewhere(document):
    text = document.read_text()
    named = re.findall(rf"(?<![\w/.~-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)
    # Inside the package, without its name: `models/layers/convolution.py`.
    rooms = [path.name for path in (ROOT / "diffusion_jax").iterdir() if path.is_dir()]
    inner = re.findall(rf"(?<![\w/.~-])((?:{'|'.join(rooms)})/[\w/]+\.py)", text)
    paths = {path for path in named if path not in INVENTED} | {
        path if (ROOT / path).exists() else f"diffusion_jax/{path}" for path in inner
    }
    assert not [path for path in sorted(paths - INVENTED) if not (ROOT / path).exists()]


@each_document
def test_blocks_have_a_language_and_a_rule_that_can_be_read(document, doc_blocks):
    assert all(block.language for block in doc_blocks.read_blocks(document, ROOT))


@each_document
def test_lists_and_tables_stand_apart(document):
    """Markdown beyond GitHub's reads a list or table only after an empty line."""
    lines = prose(document).splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        begins = line.startswith(("- ", "1. ", "|")) and before.strip()
        inside = before.startswith(("- ", "|", "  ", "#")) or re.match(r"\d+\. ", before)
        assert not begins or inside, line


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    text = (ROOT / "docs" / page).read_text().partition(f"{heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [line.strip("|").split("|") for line in lines[0].splitlines()[2:]]


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def test_the_table_of_sections_is_that_of_the_code():
    tables = {path: set(spec.table) for path, spec in sections().items()}
    tables["conditioning"] = tables["conditioning.embedders.NAME"]
    tables["hooks"] = {path[6:] for path in tables if path.startswith("hooks.")}
    tables["data"] = set()  # a table of its own, in data.md
    tables["control"] = tables["inversion"] = set()  # names are the user's
    told = {}
    for section, _, rows in rows_of("training.md", "## A config"):
        told[names_in(section).pop()] = names_in(rows), "..." in rows
    for section, (rows, shortened) in told.items():
        assert rows <= tables[section] if shortened else rows == tables[section], section
    unnamed = {path.partition(".")[0] for path in tables} - told.keys()
    assert unnamed == {"seed", "latent_cache"}


def test_the_table_of_samplers_is_that_of_the_code():
    named = [cells[0] for cells in rows_of("sampling.md", "## Samplers")]
    assert {re.search(r"`(\w+)`", cell)[1] for cell in named} == set(SAMPLERS)


def block_of(doc_blocks, tmp_path, text: str):
    page = tmp_path / "page.md"
    page.write_text(text)
    (block,) = doc_blocks.read_blocks(page, tmp_path)
    return block


def test_a_tiny_block_runs_tiny_configs(doc_blocks, tmp_path):
    block = block_of(
        doc_blocks,
        tmp_path,
        "<!-- docs: tiny, without --config.a, with --b=1, exit 2 -->\n```sh\n"
        "python launch.py --config=configs/x.py --config.a='1 2' \\\n    --c=3   # why\n"
        "python launch.py --config=configs/y.py:big\n```\n",
    )
    assert block.exit_code == 2 and block.tiny
    assert doc_blocks.commands(block) == [
        "python launch.py --config=configs/x.py:tiny --c=3 --b=1",
        "python launch.py --config=configs/y.py:big --b=1",
    ]


def test_a_tiny_block_of_python_loads_tiny_configs(doc_blocks, tmp_path):
    text = '<!-- docs: tiny -->\n```python\nload_config("mnist", {"a": 1})\n```\n'
    block = block_of(doc_blocks, tmp_path, text)
    assert doc_blocks.shrink(block.text, block).strip() == 'load_config("mnist:tiny", {"a": 1})'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nx\n```\n", "language = '' is unknown; choose from sh, python"),
        ("<!-- docs: skip -->\n```sh\nx\n```\n", "should be 'skip because REASON'"),
        ("<!-- docs: skip because -->\n```sh\nx\n```\n", "should be 'skip because REASON'"),
        ("<!-- docs: tony -->\n```sh\nx\n```\n", "rule = 'tony' is unknown"),
        ("<!-- docs: output -->\n```text\nx\n```\n", "is the output of no block"),
        ("<!-- docs tiny -->\n```sh\nx\n```\n", "should be <!-- docs: RULE -->"),
        ("```sh\nx\n", "that nothing closes"),
    ],
)
def test_a_wrong_rule_is_named(doc_blocks, tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        block_of(doc_blocks, tmp_path, text)


def test_a_page_that_lies_is_caught(run_docs, doc_blocks, tmp_path):
    block = block_of(
        doc_blocks,
        tmp_path,
        "```sh\nx\n```\n\n<!-- docs: output -->\n```text\nstep ... is   saved\n```\n",
    )
    assert not list(run_docs._missing_output(block, "at 3\nstep 4 of 5\nis saved\n"))
    assert list(run_docs._missing_output(block, "step 4 is lost"))

    block = block_of(doc_blocks, tmp_path, "```python\nprint(2)  # 3\n```\n")
    assert list(run_docs._missing_output(block, "2\n"))
    assert not list(run_docs._missing_output(block, "3\n"))


@pytest.mark.parametrize(
    ("comment", "tiny", "lies"),
    [
        ("uint8 [2, 4]", False, False),
        ("a picture: uint8 [2, 4]", False, False),
        ("uint8 [2, 5]", False, True),
        ("float32 [2, 4]", False, True),
        ("uint8 [2, 5]", True, False),
        ("uint8 [3, 4]", True, True),
    ],
)
def test_the_types_of_arrays_are_checked(run_docs, doc_blocks, tmp_path, comment, tiny, lies):
    rule = "<!-- docs: tiny -->\n" if tiny else ""
    text = f"{rule}```python\nx = make()  # {comment}\n```\n"
    block = block_of(doc_blocks, tmp_path, text)
    names = {"make": lambda: np.zeros((2, 4), np.uint8)}
    if not lies:
        run_docs._run_python(block, names)
        return
    with pytest.raises(AssertionError, match="x is uint8"):
        run_docs._run_python(block, names)


def test_a_wrong_exit_code_is_a_fault(run_docs, doc_blocks, tmp_path):
    block = block_of(doc_blocks, tmp_path, "<!-- docs: exit 3 -->\n```sh\nexit 3\n```\n")
    run_docs._run_sh(block)
    with pytest.raises(AssertionError, match="exit code = 3 should be 0"):
        run_docs._run_sh(block._replace(exit_code=0))
