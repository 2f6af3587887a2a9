"""The metrics of a run as series, read from what may be damaged, and thinned out for drawing."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# What reading a line that is no row raises.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
# Steps and seconds since 1970 are below these.
_MOST_STEPS, _MOST_SECONDS = 2.0**53, 2.0**35


class Series(NamedTuple):
    """The values of one metric: steps int64 [n] in the order of the file, values float64 [n]."""

    steps: np.ndarray
    values: np.ndarray


class Metrics(NamedTuple):
    """What a metrics.jsonl holds.

    times: seconds since 1970 of each row that tells it. unreadable: numbers of damaged lines.
    """

    series: dict[str, Series]
    times: np.ndarray
    unreadable: list[int]


def read_metrics(path: pathlib.Path) -> Metrics:
    """Read each line of a metrics.jsonl that can be read, and the numbers of those that cannot.

    A last line without an end is what a killed process leaves, and no damage.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    unreadable: list[int] = []
    try:  # all at once is several times as fast
        rows = json.loads(b"[%s]" % b",".join(lines))
        if len(rows) != len(lines):
            raise ValueError("a line holds more than one row")
        series = series_of(rows)
    except _DAMAGE:
        rows, unreadable = _whole_rows(lines)
        series = series_of(rows)
    times = series.pop("time").values if "time" in series else np.zeros(0)
    return Metrics(series, times[(times >= 0) & (times < _MOST_SECONDS)], unreadable)


def _whole_rows(lines: Sequence[bytes]) -> tuple[list[dict[str, Any]], list[int]]:
    rows, unreadable = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = {name: float(value) for name, value in json.loads(line).items()}
            if not abs(row["step"]) < _MOST_STEPS:
                raise ValueError(f"step = {row['step']} is too large")
            rows.append(row)
        except _DAMAGE:
            unreadable.append(number)
    return rows, unreadable


def series_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Turn rows {"step": step, name: value, ...} into one series for each name.

    Values may be texts that float() takes. Raises ValueError, TypeError, KeyError or AttributeError
    for what is no such row.
    """
    alike: dict[tuple[str, ...], tuple[list[int], list[list[Any]]]] = {}
    for index, row in enumerate(rows):
        indices, values = alike.setdefault(tuple(row.keys()), ([], []))
        indices.append(index)
        values.append(list(row.values()))
    parts: dict[str, list[tuple[list[int], np.ndarray, np.ndarray]]] = {}
    for names, (indices, values) in alike.items():
        columns = dict(zip(names, np.asarray(values, np.float64).T, strict=True))
        steps = columns.pop("step")
        if not (abs(steps) < _MOST_STEPS).all():  # NaN is not either
            raise ValueError(
                f"steps reach {abs(steps).max()}; they should be below {_MOST_STEPS:.0f}"
            )
        for name, column in columns.items():
            parts.setdefault(name, []).append((indices, steps.astype(np.int64), column))
    return {name: _joined(found) for name, found in parts.items()}


def _joined(parts: Sequence[tuple[list[int], np.ndarray, np.ndarray]]) -> Series:
    """Put the parts of a series together in the order of their rows."""
    indices, steps, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = indices.argsort(kind="stable")
    return Series(steps[order], values[order])


def last_step(metrics: Metrics) -> int:
    """Return the highest step of any metric, 0 without one."""
    return max((int(found.steps.max()) for found in metrics.series.values()), default=0)


def thin_out(series: Series, buckets: int) -> Series:
    """Keep the lowest and the highest finite value of each of `buckets` equal parts of a series.

    The first and the last value stay too, so at most 2 * buckets + 2 values are left, and none that
    a plot of so many pixels would show is lost.
    """
    count = len(series.values)
    if count <= 2 * buckets:
        return series
    edges = np.linspace(0, count, buckets + 1).astype(int)
    finite = np.isfinite(series.values)
    low = np.where(finite, series.values, np.inf)
    high = np.where(finite, series.values, -np.inf)
    kept = {0, count - 1}
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        kept.add(begin + int(low[begin:end].argmin()))
        kept.add(begin + int(high[begin:end].argmax()))
    chosen = np.asarray(sorted(kept), np.intp)
    return Series(series.steps[chosen], series.values[chosen])


def bucket_means(series: Series, buckets: int) -> Series:
    """Average the finite values of each of `buckets` equal parts of a series, and their steps."""
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if not len(values):
        return Series(steps, values)
    starts = np.unique(np.linspace(0, len(values), buckets, endpoint=False).astype(int))
    sizes = np.diff(np.append(starts, len(values)))
    return Series(np.add.reduceat(steps, starts) // sizes, np.add.reduceat(values, starts) / sizes)


def summary(series: Series) -> dict[str, Any]:
    """Tell the first, lowest, highest and last value, and how many there are and are not finite."""
    finite = series.values[np.isfinite(series.values)]
    return {
        "first": float(series.values[0]),
        "lowest": float(finite.min()) if len(finite) else float("nan"),
        "highest": float(finite.max()) if len(finite) else float("nan"),
        "last": float(series.values[-1]),
        "last_step": int(series.steps[-1]),
        "count": len(series.values),
        "not_finite": len(series.values) - len(finite),
    }


def same_series(series: Mapping[str, Series]) -> dict[str, list[str]]:
    """Map each name to the other names that have its steps and, to five digits, its values.

    Names whose values another one has too do not come as keys of their own.
    """
    found: dict[str, list[str]] = {}
    by_steps: dict[bytes, list[str]] = {}
    for name in sorted(series):
        others = by_steps.setdefault(series[name].steps.tobytes(), [])
        first = next((other for other in others if _same(series[other], series[name])), None)
        if first is None:
            others.append(name)
            found[name] = []
        else:
            found[first].append(name)
    return found


def _same(left: Series, right: Series) -> bool:
    return np.allclose(left.values, right.values, rtol=1e-5, atol=0, equal_nan=True)
