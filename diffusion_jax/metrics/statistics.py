"""Statistics of features as streams: init() -> state, update(state, ...) -> state, result(state).

A stream takes the rows of a batch with the number of each record, and -1 for padding. It needs the
same memory however many batches come, and neither the order of the records nor how they are split
into batches changes its result, except for the last digits of sums in float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Statistic(NamedTuple):
    """A stream over batches.

    init: () -> state. update: (state, rows [b ...], ids [b]) -> state; rows with id -1 are padding.
    result: state -> what the stream found; ValueError when it saw too little.
    """

    init: Callable[[], Any]
    update: Callable[[Any, np.ndarray, np.ndarray], Any]
    result: Callable[[Any], Any]


class Moments(NamedTuple):
    """The number of rows [], their mean [d] and covariance [d d] in float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray


class Kept(NamedTuple):
    """Rows [n d] in float32 and the numbers of their records [n], ascending."""

    ids: np.ndarray
    rows: np.ndarray


def moments() -> Statistic:
    """Make the stream of the mean and the unbiased covariance of rows [b d], in float64.

    Batches are merged by their own means, so a mean far from 0 costs no digits.
    Source: Chan, Golub and LeVeque 1979.
    """

    def update(state: tuple[int, Any, Any], rows: np.ndarray, ids: np.ndarray) -> Any:
        rows = rows[ids >= 0].astype(np.float64)
        if len(rows) == 0:
            return state
        count, mean, scatter = state
        new_mean = rows.mean(0)
        centred = rows - new_mean
        total, shift = count + len(rows), new_mean - mean
        scatter = scatter + centred.T @ centred
        scatter = scatter + np.outer(shift, shift) * (count * len(rows) / total)
        return total, mean + shift * (len(rows) / total), scatter

    def result(state: tuple[int, Any, Any]) -> Moments:
        count, mean, scatter = state
        if count < 2:
            raise ValueError(f"a covariance of {count} samples should have at least 2")
        return Moments(count, mean, scatter / (count - 1))

    return Statistic(lambda: (0, 0.0, 0.0), update, result)


def keep(limit: int) -> Statistic:
    """Make the stream that keeps the rows of at most `limit` records, a fair choice of all.

    The records with the smallest hash of their number are kept, whatever order they come in.
    """
    if limit < 1:
        raise ValueError(f"limit = {limit} should be at least 1")

    def update(state: Kept | None, rows: np.ndarray, ids: np.ndarray) -> Kept:
        real = ids >= 0
        rows, ids = rows[real].astype(np.float32), ids[real].astype(np.int64)
        if state is not None:
            rows, ids = np.concatenate([state.rows, rows]), np.concatenate([state.ids, ids])
        if len(ids) > limit:
            chosen = np.argsort(_hashes(ids), kind="stable")[:limit]
            rows, ids = rows[chosen], ids[chosen]
        return Kept(ids, rows)

    def result(state: Kept | None) -> Kept:
        if state is None or len(state.ids) == 0:
            raise ValueError("0 samples were given, which should be at least 1")
        order = np.argsort(state.ids, kind="stable")
        return Kept(state.ids[order], state.rows[order])

    return Statistic(lambda: None, update, result)


def mean() -> Statistic:
    """Make the stream of the mean of numbers [b] -> (mean, standard error) in float64."""
    stream = moments()

    def result(state: Any) -> tuple[float, float]:
        found = stream.result(state)
        return float(found.mean[0]), float(np.sqrt(found.covariance[0, 0] / found.count))

    return Statistic(
        stream.init, lambda state, rows, ids: stream.update(state, rows[:, None], ids), result
    )


def entropies(splits: int = 10) -> Statistic:
    """Make the stream behind the Inception Score: class probabilities [b c] -> scores [splits].

    Record i belongs to part i mod splits. The score of a part is exp(mean KL(p(y | x) || p(y))).
    Source: Salimans et al. 2016, section 4.
    """

    def update(state: Any, rows: np.ndarray, ids: np.ndarray) -> Any:
        rows, ids = rows[ids >= 0].astype(np.float64), ids[ids >= 0]
        start = np.zeros(splits), np.zeros((splits, rows.shape[1])), np.zeros(splits)
        count, total, negative = (array.copy() for array in state or start)
        part = ids % splits
        np.add.at(count, part, 1.0)
        np.add.at(total, part, rows)
        logs = np.log(np.where(rows > 0.0, rows, 1.0))
        np.add.at(negative, part, (rows * logs).sum(1))
        return count, total, negative

    def result(state: Any) -> np.ndarray:
        count, total, negative = state or (
            np.zeros(splits),
            np.zeros((splits, 1)),
            np.zeros(splits),
        )
        if count.min() < 1:
            raise ValueError(
                f"{int(count.sum())} samples are too few for the {splits} parts of an Inception "
                f"Score; there should be at least {splits}"
            )
        marginal = total / count[:, None]
        entropy = (marginal * np.log(np.where(marginal > 0.0, marginal, 1.0))).sum(1)
        return np.exp(negative / count - entropy)

    return Statistic(lambda: None, update, result)


def _hashes(ids: np.ndarray) -> np.ndarray:
    """Mix the bits of int64 numbers -> uint64. Source: Steele et al. 2014, SplitMix64."""
    z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
