"""The pictures of a run as parts of a page, as many as fit."""

import base64
import pathlib
from collections.abc import Sequence
from typing import Any

from diffusion_jax.runs.report.gathering import Gathered

# Pictures of one kind that are shown, evenly spread over the steps, and bytes of all of them.
MAX_STEPS = 24
MAX_BYTES = 24 << 20
_FIRST = ("samples", "clips", "reconstructions")


def embedded(run: Gathered, max_bytes: int) -> dict[str, Any]:
    """Choose pictures of a run and turn them into data -> {"names", "steps", "files"}.

    files: name -> {step: data URL}; samples come first. Fewer steps are chosen until all pictures
    together have at most max_bytes, and none is left out of the last step.
    """
    order = sorted(run.pictures, key=lambda name: (_rank(name), name))
    count = MAX_STEPS
    while True:
        chosen = {name: _spread(run.pictures[name], count) for name in order}
        size = sum(path.stat().st_size for files in chosen.values() for _, path in files)
        if size <= max_bytes or count == 1:
            break
        count //= 2
    files = {
        name: {step: {"image": _data_url(path), "texts": _texts(path)} for step, path in found}
        for name, found in chosen.items()
    }
    steps = sorted({step for found in files.values() for step in found})
    return {"names": order, "steps": steps, "files": files}


def _rank(name: str) -> tuple[int, int]:
    key = name.rpartition("/")[2]
    return (_FIRST.index(key) if key in _FIRST else len(_FIRST), 0 if name.startswith("val") else 1)


def _spread(files: Sequence[Any], count: int) -> list[Any]:
    if len(files) <= count:
        return list(files)
    last = len(files) - 1
    return [files[last - (i * last) // max(count - 1, 1)] for i in reversed(range(count))]


def _data_url(path: pathlib.Path) -> str:
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _texts(path: pathlib.Path) -> list[str]:
    """Read the captions that lie beside a picture, one a line."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return []
    return beside.read_text(encoding="utf-8", errors="replace").splitlines()
