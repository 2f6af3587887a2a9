"""What a run did, in the lines of a terminal."""

import datetime
from collections.abc import Sequence

from diffusion_jax.runs.report.gathering import Gathered, count_pictures
from diffusion_jax.runs.report.rows import Series, same_series, summary

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32


def text_report(run: Gathered) -> list[str]:
    """Summarise a run in lines: progress, a table of metrics, checkpoints, pictures."""
    total = "an unknown number" if run.total is None else run.total
    seen = "" if run.images_seen is None else f", {run.images_seen:,} images seen"
    lines = [
        f"{run.folder}: step {run.step} of {total}",
        f"  {run.state}, {duration(run.seconds)} of training{seen}",
    ]
    if run.metrics.unreadable:
        numbers = few(run.metrics.unreadable)
        lines.append(f"  {run.folder / 'metrics.jsonl'} is damaged: lines left out: {numbers}")
    lines += _table(run.metrics.series)
    lines.append(f"checkpoints: {', '.join(map(str, run.checkpoints)) or 'none'}")
    if run.best is not None:
        best = run.best
        lines.append(f"best {best.monitor}: {best.value:.5g} at step {best.step}")
    logged = count_pictures(run.folder / "images")
    lines.append(f"pictures: {logged} logged, {run.num_samples} sampled")
    return lines


def _table(series: dict[str, Series]) -> list[str]:
    shown = {name: same for name, same in same_series(series).items() if "levels/" not in name}
    width = max(map(len, shown), default=0)
    lines = [f"  {'':{width}} {'first':>10} {'lowest':>10} {'last':>10}"]
    for name, same in shown.items():
        values = summary(series[name])
        numbers = " ".join(f"{values[column]:>10.5g}" for column in ("first", "lowest", "last"))
        curve = sparkline(series[name].values.tolist())
        lines.append(f"  {name:{width}} {numbers}  {curve}".rstrip())
        if same:
            lines.append(f"  {'':{width}} the same: {', '.join(same)}")
    return lines


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Draw values as one line of block characters, averaged down to `width`; NaN as '!'."""
    size = max(1, -(-len(values) // width))
    means = [
        sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)
    ]
    finite = [mean for mean in means if mean == mean and abs(mean) != float("inf")]
    if not finite:
        return "!" * len(means)
    low, span = min(finite), max(finite) / 2 - min(finite) / 2  # halves do not overflow
    return "".join(
        BARS[int((mean / 2 - low / 2) / span * (len(BARS) - 1)) if span else 0]
        if mean in finite
        else "!"
        for mean in means
    )


def duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds, with days before them."""
    return str(datetime.timedelta(seconds=round(seconds)))


def few(numbers: Sequence[int], shown: int = 4) -> str:
    """List the first numbers, and say by dots that there are more."""
    return ", ".join(map(str, numbers[:shown])) + (", ..." if len(numbers) > shown else "")
