"""Pages of the site that are not files in docs/: the top-level documents and the API reference.

A hook of mkdocs. Every public module gets a page on which mkdocstrings shows its docstrings.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Where each document goes; links between them and to docs/ are rewritten.
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
# Parts whose functions others call. cli is described by `launch.py --help`.
PUBLIC = (
    "diffusion",
    "models",
    "data",
    "train",
    "devices",
    "metrics",
    "convert",
    "experiment",
    "runs",
    "plan",
)


def on_config(config: Any) -> Any:
    """Add the API reference to the navigation: the package, then each part with its modules."""
    parts: list[Any] = [{"diffusion_jax": "api/diffusion_jax.md"}]
    names = public_modules()
    for part in PUBLIC:
        inside = [name for name in names if name.split(".")[1] == part]
        parts.append({part: [{_title(name): _page(name)} for name in inside]})
    config.nav.append({"API": parts})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the documents and one page per module."""
    for name, target in DOCUMENTS.items():
        text = (ROOT / name).read_text()
        files.append(File.generated(config, target, content=_relinked(text)))
    for name in ["diffusion_jax", *public_modules()]:
        files.append(File.generated(config, _page(name), content=_module_page(name)))
    return files


def public_modules() -> list[str]:
    """Names of all modules of the public parts, packages before what is in them."""
    found = []
    for part in PUBLIC:
        for path in sorted((ROOT / "diffusion_jax" / part).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(".".join(parts))
    return sorted(found)


def _page(module: str) -> str:
    return f"api/{module}.md"


def _title(module: str) -> str:
    return module.split(".", 2)[-1] if module.count(".") > 1 else "overview"


def _module_page(module: str) -> str:
    if module != "diffusion_jax":
        return f"# {module}\n\n::: {module}\n"
    # Its names are loaded on first use, so they are shown from where they are defined.
    import diffusion_jax

    homes = diffusion_jax._HOMES
    shown = "\n".join(
        f"::: {homes[name]}.{name}\n    options:\n      show_root_heading: true\n"
        for name in diffusion_jax.__all__
    )
    return f"# diffusion_jax\n\n```python\nfrom diffusion_jax import Pipeline\n```\n\n{shown}"


def _relinked(text: str) -> str:
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^\]]*)\]\((?:LICENSE|CITATION\.cff)\)", r"\1", text)
