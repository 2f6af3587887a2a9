"""What a run did, from what it wrote, without a device."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from diffusion_jax.runs.comparison import leaves, to_plain
from diffusion_jax.runs.folder import load_saved_config

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60


def report_run(workdir: str | os.PathLike) -> list[str]:
    """Summarise a run folder in lines: progress, losses, speed, checkpoints, pictures.

    Raises FileNotFoundError when the folder holds no run or no metrics.
    """
    workdir = pathlib.Path(workdir)
    config = load_saved_config(workdir)
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} has no metrics yet: {path} does not exist")
    rows, unreadable = _whole_rows(path)
    if not rows:
        raise ValueError(f"{path} is empty: the run has not logged a step yet")
    last = max(int(row["step"]) for row in rows)
    wanted = leaves(to_plain(config))
    total = wanted["train.num_steps"] if "train.num_steps" in wanted else "an unknown number"
    lines = [f"{workdir}: step {last} of {total}"]
    if unreadable:
        numbers = ", ".join(map(str, unreadable[:4])) + (", ..." if len(unreadable) > 4 else "")
        lines.append(f"  {path} is damaged: lines left out: {numbers}")
    names = sorted({name for row in rows for name in row} - {"step", "time"})
    losses = [name for name in names if name.endswith(("loss", "loss_simple", "loss_simple_ema"))]
    lines += [_curve(name, rows) for name in losses]
    speeds = [name for name in names if name not in losses]
    lines += [f"  {name:32} last {_series(name, rows)[-1]:.5g}" for name in speeds]
    lines.append(f"checkpoints: {', '.join(_checkpoints(workdir)) or 'none'}")
    lines.append(
        f"pictures: {_count(workdir / 'images')} logged, {_count(workdir / 'samples')} sampled"
    )
    return lines


def _whole_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read all rows of a file that can be read, and the numbers of the lines that cannot.

    A last line without an end is what a killed process leaves, and no damage.
    """
    rows, unreadable = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = {key: float(value) for key, value in json.loads(line).items()}
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            unreadable.append(number)
    return rows, unreadable


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Draw values as one line of block characters, averaged down to `width`; NaN as '!'."""
    size = max(1, -(-len(values) // width))
    means = [
        sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)
    ]
    finite = [mean for mean in means if mean == mean and abs(mean) != float("inf")]
    if not finite:
        return "!" * len(means)
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        BARS[int((mean - low) / span * (len(BARS) - 1)) if span else 0] if mean in finite else "!"
        for mean in means
    )


def _curve(name: str, rows: list[dict[str, Any]]) -> str:
    values = _series(name, rows)
    return (
        f"  {name:32} {sparkline(values)}\n"
        f"  {'':32} first {values[0]:.5g}, best {min(values):.5g}, last {values[-1]:.5g}"
    )


def _series(name: str, rows: list[dict[str, Any]]) -> list[float]:
    return [row[name] for row in rows if name in row]


def _checkpoints(workdir: pathlib.Path) -> list[str]:
    folder = workdir / "checkpoints"
    steps = (
        [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        if folder.is_dir()
        else []
    )
    return [str(step) for step in sorted(steps)]


def _count(folder: pathlib.Path) -> int:
    return sum(1 for _ in folder.rglob("*.png")) if folder.is_dir() else 0
