"""Which runs lie in folders, how far they are, and how good."""

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import NamedTuple

from diffusion_jax.runs.comparison import leaves, to_plain
from diffusion_jax.runs.folder import find_record, has_run
from diffusion_jax.runs.report.gathering import (
    METRICS_FILE,
    Best,
    find_best,
    newest_metadata,
    run_state,
)
from diffusion_jax.runs.report.rows import Series, series_of
from diffusion_jax.train.checkpoints.reading import saved_steps

# Bytes at the end of a metrics.jsonl in which its last whole line is looked for.
_TAIL = 1 << 16


class Listed(NamedTuple):
    """A run in a list. age: seconds since it last wrote metrics, or since it began."""

    folder: pathlib.Path
    state: str
    step: int
    total: int | None
    age: float
    best: Best | None


def list_runs(*folders: str | os.PathLike) -> list[Listed]:
    """Look at folders and the folders in them for runs -> the newest one first.

    Links are left out. Little is read of each run, so that many may be there.
    Raises FileNotFoundError when there is no such folder.
    """
    places = []
    for folder in map(pathlib.Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; name one that holds runs: runs FOLDER")
        places += [folder, *sorted(folder.iterdir())]
    runs = [path for path in places if path.is_dir() and not path.is_symlink() and has_run(path)]
    return sorted(map(_look, dict.fromkeys(runs)), key=lambda run: run.age)


def run_lines(runs: list[Listed]) -> list[str]:
    """Lay out runs as a table, one line each."""
    rows = [("run", "state", "step", "age", "best")]
    for run in runs:
        of = "" if run.total is None else f" of {run.total:,}"
        best = run.best
        best_text = "" if best is None else f"{best.monitor} {best.value:.5g} at step {best.step:,}"
        rows.append((str(run.folder), run.state, f"{run.step:,}{of}", age_text(run.age), best_text))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def age_text(seconds: float) -> str:
    """Write an age by its largest unit: 40 s, 3 min, 5 h, 12 d."""
    for unit, size, until in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < until * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def _look(folder: pathlib.Path) -> Listed:
    record, _ = find_record(folder)
    config = {} if record is None else leaves(to_plain(record.config))
    total = config["train.num_steps"] if "train.num_steps" in config else None
    total = total if isinstance(total, int) else None
    metrics = folder / METRICS_FILE
    step = max([_last_step(metrics), *saved_steps(folder / "checkpoints")])
    written = (metrics if metrics.is_file() else folder).stat().st_mtime
    return Listed(
        folder=folder,
        state=run_state(folder, step, total),
        step=step,
        total=total,
        age=max(0.0, time.time() - written),
        best=find_best(config, _scores(folder)),
    )


def _last_step(path: pathlib.Path) -> int:
    """Read the step of the last whole line that can be read; 0 without one."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        *lines, _ = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue  # `report` names damaged lines
    return 0


def _scores(folder: pathlib.Path) -> Mapping[str, Series]:
    """Read the scores that the newest checkpoint tells, as series."""
    metadata = newest_metadata(folder) or {}
    scores = metadata["scores"] if "scores" in metadata else {}
    return series_of({**found, "step": int(step)} for step, found in scores.items())
