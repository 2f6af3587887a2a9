"""Everything that a report tells of one run, read from its folder."""

import fcntl
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from diffusion_jax.runs.comparison import leaves, to_plain
from diffusion_jax.runs.facts import read_facts, said, short_data, starts_of
from diffusion_jax.runs.folder import LOCK, load_record
from diffusion_jax.runs.report.rows import Metrics, Series, last_step, read_metrics
from diffusion_jax.train.checkpoints.reading import load_metadata, saved_steps
from diffusion_jax.train.hooks.validation import KINDS

METRICS_FILE = "metrics.jsonl"
_log = logging.getLogger(__name__)
_PICTURE = re.compile(r"(.+)_gs-(\d+)\.(png|gif)")


class Best(NamedTuple):
    """The best of the steps that were scored, by config.checkpoint.monitor."""

    monitor: str
    mode: str
    step: int
    value: float


class Gathered(NamedTuple):
    """One run, as its folder tells it.

    config: its values by path. differs: {"path", "file", "run"} of values that are not as in the
    file that the config came from, None if that is not known. starts: see runs.facts. facts: what
    the newest start or checkpoint says of code, data and hardware. step: the last one that was
    logged, of `total`. seconds: that training took, all starts together. images_seen: None if the
    config does not tell the batch size. checkpoints: saved steps -> their scores. pictures: name
    -> (step, file) in order. draws: whether `sample` can draw from it.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    differs: list[dict[str, str]] | None
    changes: tuple[dict[str, Any], ...]
    forked_from: str | None
    starts: list[dict[str, Any]]
    facts: dict[str, Any]
    state: Literal["running", "finished", "stopped"]
    step: int
    total: int | None
    seconds: float
    images_seen: int | None
    metrics: Metrics
    checkpoints: dict[int, dict[str, float]]
    best: Best | None
    pictures: dict[str, list[tuple[int, pathlib.Path]]]
    num_samples: int
    draws: bool


def gather(workdir: str | os.PathLike) -> Gathered:
    """Read the folder of a run.

    Raises FileNotFoundError when the folder holds no run or no metrics, ValueError when there is no
    step in them.
    """
    workdir = pathlib.Path(workdir)
    record = load_record(workdir)
    path = workdir / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} has no metrics yet: {path} does not exist")
    metrics = read_metrics(path)
    if not metrics.series:
        raise ValueError(f"{path} is empty: the run has not logged a step yet")
    config = leaves(to_plain(record.config))
    starts = starts_of(read_facts(workdir))
    step, total = last_step(metrics), _number(config, "train.num_steps")
    batch = _number(config, "train.batch_size")
    differences = [start["differs"] for start in starts if isinstance(start.get("differs"), list)]
    scores = _scores(metrics)
    return Gathered(
        folder=workdir,
        config=config,
        differs=differences[-1] if differences else None,
        changes=record.changes,
        forked_from=record.forked_from,
        starts=starts,
        facts=_facts(workdir, starts),
        state=run_state(workdir, step, total),
        step=step,
        total=total,
        seconds=_seconds(metrics.times, [float(start["time"]) for start in starts]),
        images_seen=None if batch is None else step * batch,
        metrics=metrics,
        checkpoints={
            saved: scores[saved] if saved in scores else {}
            for saved in saved_steps(workdir / "checkpoints")
        },
        best=find_best(config, metrics.series),
        pictures=_pictures(workdir / "images"),
        num_samples=count_pictures(workdir / "samples"),
        draws=any(name.startswith("sampler.") for name in config),
    )


def run_state(
    workdir: pathlib.Path, step: int, total: int | None
) -> Literal["running", "finished", "stopped"]:
    """Tell whether a process trains in a folder now, and if not, whether the last step is done."""
    if is_locked(workdir):
        return "running"
    return "finished" if total is not None and step >= total else "stopped"


def is_locked(workdir: pathlib.Path) -> bool:
    """Tell whether a process of this host trains in a folder."""
    path = workdir / LOCK
    if not path.is_file():
        return False
    with path.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def find_best(config: Mapping[str, Any], scores: Mapping[str, Series]) -> Best | None:
    """Find the best score by config.checkpoint.monitor; None without one that is a number."""
    monitor = config["checkpoint.monitor"] if "checkpoint.monitor" in config else None
    if monitor is None or monitor not in scores:
        return None
    mode = config["checkpoint.mode"] if "checkpoint.mode" in config else "min"
    steps, values = scores[monitor]
    sign = -1.0 if mode == "max" else 1.0
    cost = np.where(np.isfinite(values), sign * values, np.inf)
    if not np.isfinite(cost).any():
        return None
    index = int(cost.argmin())
    return Best(str(monitor), str(mode), int(steps[index]), float(values[index]))


def config_table(runs: Sequence[Gathered]) -> list[tuple[str, list[str]]]:
    """List (path, the value in each run) of all values that are not the same in all runs."""
    paths = sorted({path for run in runs for path in run.config})
    rows = [
        (path, [said(run.config[path]) if path in run.config else "unset" for run in runs])
        for path in paths
    ]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def count_pictures(folder: pathlib.Path) -> int:
    """Count the PNGs in a folder and below."""
    return sum(1 for _ in folder.rglob("*.png")) if folder.is_dir() else 0


def _number(config: Mapping[str, Any], path: str) -> int | None:
    value = config[path] if path in config else None
    return value if isinstance(value, int) else None


def _seconds(times: np.ndarray, starts: Sequence[float]) -> float:
    """Add up the time between rows, and from each start to the row after it."""
    if not len(times):
        return 0.0
    began = np.asarray(sorted(starts))
    previous = np.concatenate([[times[0]], times[:-1]])
    if len(began):
        latest = np.searchsorted(began, times, side="right") - 1
        previous = np.where(
            latest >= 0, np.maximum(previous, began[np.maximum(latest, 0)]), previous
        )
        if began[0] <= times[0]:
            previous[0] = began[latest[0]]
    return float(np.maximum(times - previous, 0.0).sum())


def _scores(metrics: Metrics) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for name, (steps, values) in metrics.series.items():
        if name.startswith(KINDS):
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                found.setdefault(step, {})[name] = value
    return found


def _facts(workdir: pathlib.Path, starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tell what a run was made from: its newest starts say it, else its newest checkpoint."""
    if starts:
        return {name: value for start in starts for name, value in start.items()}
    metadata = newest_metadata(workdir)
    if metadata is None:
        return {}
    found = {name: metadata[name] for name in ("revision", "packages") if name in metadata}
    return {**found, "data": short_data(metadata["data"] if "data" in metadata else {})}


def newest_metadata(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Read the metadata of the newest checkpoint whose metadata can be read; None without one."""
    directory = workdir / "checkpoints"
    for step in reversed(saved_steps(directory)):
        try:
            return load_metadata(directory, step=step)
        except ValueError as error:  # damaged, or of a newer version
            _log.info("%s", error)
    return None


def _pictures(folder: pathlib.Path) -> dict[str, list[tuple[int, pathlib.Path]]]:
    found: dict[str, list[tuple[int, pathlib.Path]]] = {}
    for path in sorted(folder.rglob("*_gs-*")) if folder.is_dir() else []:
        match = _PICTURE.fullmatch(path.relative_to(folder).as_posix())
        if match is not None:
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {name: sorted(files) for name, files in found.items()}
