"""What the runs of a report are, in words: when, where, how long, on which data."""

import datetime
from collections.abc import Sequence
from typing import Any

from diffusion_jax.runs.report.gathering import Gathered
from diffusion_jax.runs.report.text import duration


def labels(runs: Sequence[Gathered]) -> list[str]:
    """Name runs by the ends of their paths, as long as it takes to tell them apart."""
    parts = [run.folder.absolute().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    repeated = len(set(names)) < len(names)
    return [f"{i}: {name}" for i, name in enumerate(names, 1)] if repeated else names


def about(runs: Sequence[Gathered]) -> list[tuple[str, list[str]]]:
    """List (what, its value in each run) of what is known of any run."""
    rows = [(name, [tell(run) for run in runs]) for name, tell in _ABOUT.items()]
    return [(name, values) for name, values in rows if any(values)]


def number(value: float) -> str:
    """Write a number with five digits that count."""
    whole = value.is_integer() and abs(value) >= 1e5
    return f"{value:,.0f}" if whole else f"{value:.5g}"


def _fact(run: Gathered, *path: str) -> Any:
    found: Any = run.facts
    for name in path:
        if not isinstance(found, dict) or name not in found:
            return ""
        found = found[name]
    return found


def _tell_step(run: Gathered) -> str:
    return f"{run.step:,} of {'an unknown number' if run.total is None else f'{run.total:,}'}"


def _tell_hardware(run: Gathered) -> str:
    if not _fact(run, "hardware", "device"):
        return ""
    devices, processes = _fact(run, "hardware", "devices"), _fact(run, "hardware", "processes")
    return (
        f"{devices} x {_fact(run, 'hardware', 'device')}, {processes} process"
        f"{'' if processes == 1 else 'es'}, {_fact(run, 'hardware', 'cores')} cores, "
        f"{_fact(run, 'hardware', 'system')}"
    )


def _tell_data(run: Gathered) -> str:
    found = _fact(run, "data")
    if not isinstance(found, dict):
        return ""
    roles = sorted(found, key=lambda role: (role != "train", role == "test", role))
    return "; ".join(f"{role}: {_tell_split(found[role])}" for role in roles)


def _tell_split(split: Any) -> str:
    if not isinstance(split, dict):
        return ""
    values = (split[name] for name in ("name", "num_examples", "digest") if name in split)
    return ", ".join(map(_tell_value, values))


def _tell_value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _tell_packages(run: Gathered) -> str:
    found = _fact(run, "packages")
    return ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else ""


def _tell_starts(run: Gathered) -> str:
    return ", ".join(
        f"{datetime.datetime.fromtimestamp(start['time']):%Y-%m-%d %H:%M} at step {start['step']}"
        for start in run.starts
        if "step" in start
    )


_ABOUT = {
    "folder": lambda run: str(run.folder),
    "state": lambda run: run.state,
    "step": _tell_step,
    "images seen": lambda run: "" if run.images_seen is None else f"{run.images_seen:,}",
    "time of training": lambda run: duration(run.seconds),
    "best": lambda run: (
        ""
        if run.best is None
        else f"{run.best.monitor} {number(run.best.value)} at step {run.best.step:,}"
    ),
    "config file": lambda run: str(_fact(run, "config_file")),
    "data": _tell_data,
    "hardware": _tell_hardware,
    "revision": lambda run: str(_fact(run, "revision")),
    "packages": _tell_packages,
    "started": _tell_starts,
    "forked from": lambda run: run.forked_from or "",
}
