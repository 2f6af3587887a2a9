"""The laws that a machine can check: sizes, swallowed errors, silent defaults, retired JAX calls.

Each rule is a function from a parsed file to the lines that break it; each is also seen to fire on
code that is bad.
"""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusion_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
SHIPPED = (
    FILES + sorted(ROOT.glob("configs/*.py")) + [f for f in [ROOT / "launch.py"] if f.exists()]
)
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 70

Rule = Callable[[ast.Module], Iterator[tuple[int, str]]]


def long_functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} is {lines} lines long"


def swallowed_errors(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else None
            everything = node.type is None or caught in ("Exception", "BaseException")
            if everything and not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
                yield node.lineno, "catches everything and does not raise"


def config_get(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """`.get(` on anything named like a config: a default lives once, in a signature."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if node.func.attr == "get" and re.search(r"(?i)(config|cfg|section)\w*$", owner):
                yield node.lineno, f"{owner}.get(...)"


def prints(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "print":
                yield node.lineno, "print(...)"


def retired_jax(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What JAX has deprecated or replaced: pmap, experimental.shard_map, PRNGKey, `with mesh:`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "jax.pmap",
            "jax.experimental.shard_map",
            "jax.experimental.maps",
            "jax.random.PRNGKey",
            "jax.tree_map",
        ):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            for name in names:
                if re.match(
                    r"jax\.(pmap|experimental\.(shard_map|maps|pjit)|random\.PRNGKey)", name
                ):
                    yield node.lineno, name
        elif isinstance(node, ast.With):
            for item in node.items:
                if re.search(r"(^|\.)mesh$", ast.unparse(item.context_expr)):
                    yield node.lineno, "with mesh: (pass shardings, or use jax.set_mesh)"


def stubs(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            if "NotImplementedError" in ast.unparse(node.exc):
                yield node.lineno, "raises NotImplementedError: a part was left out"


def other_dialects(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Errors say `x = 3 should be at least 4`: what is wrong, its value, what would be right."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant)]
            for text in filter(lambda text: isinstance(text, str), texts):
                if found := re.search(r"\b(must|(has|have|needs?|ought) to be)\b", text):
                    yield node.lineno, f"says {found[0]!r} instead of 'should be': {text!r}"


def asked_kinds(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Nothing asks which kind of first stage or task it has: a record of functions knows."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            kinds = re.search(r"\b(Video)?Autoencoder\b|\bTask\b", ast.unparse(node.args[-1]))
            if kinds:
                yield node.lineno, f"asks for {kinds[0]}"


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def may_print(path: Path) -> bool:
    """The command line and the progress line speak to a person."""
    return path.stem in ("cli", "progress") or "cli" in path.relative_to(ROOT).parts


def reads_config(path: Path) -> bool:
    return "experiment" in path.relative_to(ROOT).parts


RULES: dict[str, tuple[Rule, list[Path], str]] = {
    # name: rule, the files it holds for, code that breaks it
    "long functions": (
        long_functions,
        FILES,
        "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
    ),
    "swallowed errors": (swallowed_errors, SHIPPED, "try:\n    f()\nexcept Exception:\n    pass"),
    "bare except": (swallowed_errors, SHIPPED, "try:\n    f()\nexcept:\n    pass"),
    "config defaults": (
        config_get,
        [f for f in FILES if not reads_config(f)],
        "size = self.config.get('size', 3)",
    ),
    "print": (prints, [f for f in FILES if not may_print(f)], "print('x')"),
    "pmap": (retired_jax, SHIPPED, "step = jax.pmap(f)"),
    "shard_map": (retired_jax, SHIPPED, "from jax.experimental.shard_map import shard_map"),
    "with mesh": (retired_jax, SHIPPED, "with mesh:\n    f()"),
    "legacy keys": (retired_jax, SHIPPED, "key = jax.random.PRNGKey(0)"),
    "stubs": (stubs, SHIPPED, "def f():\n    raise NotImplementedError"),
    "kinds": (asked_kinds, SHIPPED, "if isinstance(module, VideoAutoencoder):\n    pass"),
    "dialect": (
        other_dialects,
        FILES,
        "if x < 4:\n    raise ValueError(f'x={x} must be at least 4')",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_holds(name):
    rule, files, _ = RULES[name]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in files
        for line, what in rule(parsed(path))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", RULES)
def test_rule_fires_on_bad_code(name):
    rule, _, bad = RULES[name]
    assert list(rule(ast.parse(bad)))


def test_files_are_short():
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in FILES}
    assert lengths
    assert not {name: n for name, n in lengths.items() if n > MAX_FILE_LINES}


# Modules without a test file of their name in the same place under tests/; one that has got its
# tests is to be taken out.
WITHOUT_MIRROR = frozenset(
    """
    convert/weights/first_stage_names.py
    convert/weights/tables.py
    convert/yaml/conditioning.py
    convert/yaml/first_stage_tables.py
    convert/yaml/lightning_tables.py
    convert/yaml/tables.py
    convert/yaml/video_tables.py
    models/first_stage/blocks.py
    types.py
    """.split()
)


def test_every_module_has_a_test_file_of_its_name():
    names = {
        path.relative_to(PACKAGE) for path in FILES if path.stem not in ("__init__", "__main__")
    }
    missing = {
        name.as_posix()
        for name in names
        if not (ROOT / "tests" / name.parent / f"test_{name.name}").is_file()
    }
    assert missing == WITHOUT_MIRROR


RIDDLES = re.compile(r"\b((that|those)\s+of|of\s+which|(is|are)\s+told)\b", re.IGNORECASE)
PROSE = [
    path
    for pattern in (
        "*.md docs/*.md configs/*.py diffusion_jax/**/*.py benchmarks/*.py tools/*.py notebooks/*"
    ).split()
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md" and path.is_file()
]


def test_plain_sentences_instead_of_riddles():
    assert RIDDLES.search("The size is that of the image.") and len(PROSE) > len(FILES)
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path in PROSE
        for text in [path.read_text()]
        for match in RIDDLES.finditer(text)
    ]
    assert not found, "\n".join(found)
