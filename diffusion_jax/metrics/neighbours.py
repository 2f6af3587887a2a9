"""Precision, recall, density, coverage and copies: what the nearest neighbours of samples tell."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# Numbers of a block of distances, which bounds the memory: 64 MiB of float64.
_BLOCK = 2**23


class Manifold(NamedTuple):
    """Shares of samples among the data and of data among the samples.

    precision, recall: of samples, and of data, inside the other set's balls, which reach to the
    third neighbour. density, coverage: of the data's balls to the fifth neighbour that a sample
    lies in, over 5, and of balls that hold a sample; density may be above 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


class Copies(NamedTuple):
    """How near samples are to training data.

    copied: the share of samples that are nearer to a training record than its own nearest fellow
    is. ratio: the mean distance of samples to the nearest training record, over the mean distance
    between training records; about 1 for new samples, 0 for copies.
    """

    copied: float
    ratio: float


def manifold(samples: np.ndarray, data: np.ndarray, *, balls: int = 3, dense: int = 5) -> Manifold:
    """Compute all four from rows [n d] and [m d].

    Raises ValueError when a set has too few rows for `dense` neighbours.
    Sources: Kynkaanniemi et al. 2019, equations 1 to 3 (precision, recall); Naeem et al. 2020,
    equations 3 and 4 (density, coverage).
    """
    for name, rows in (("samples", samples), ("records", data)):
        if len(rows) <= dense:
            raise ValueError(
                f"{len(rows)} {name} are too few for {dense} neighbours; there should be at least "
                f"{dense + 1}"
            )
    own = nearest_distances(data, data, balls, dense, same=True)
    near, far = own[:, 0], own[:, 1]
    theirs = nearest_distances(samples, samples, balls, balls, same=True)[:, 0]
    inside, hits = np.zeros(len(samples), bool), np.zeros(len(samples))
    recalled, covered = np.zeros(len(data), bool), np.zeros(len(data), bool)
    for rows, squares in squared_distances(samples, data):
        inside[rows] = (squares <= near[None]).any(1)
        hits[rows] = (squares < far[None]).sum(1)
        recalled |= (squares <= theirs[rows, None]).any(0)
        covered |= (squares < far[None]).any(0)
    density = float(hits.mean() / dense)
    return Manifold(float(inside.mean()), float(recalled.mean()), density, float(covered.mean()))


def copies(samples: np.ndarray, training: np.ndarray, *, seed: int = 0) -> Copies:
    """Compare each sample [n d] with its nearest training record [m d].

    The distance between training records is a mean over at most n of them.
    Raises ValueError for fewer than 2 training records.
    Source: Alaa et al. 2022, "How Faithful is your Synthetic Data?", section 3 (authenticity).
    """
    if len(training) < 2:
        raise ValueError(f"{len(training)} training records should be at least 2")
    found = nearest(samples, training)
    owners, places = np.unique(found.places, return_inverse=True)
    fellows = _fellows(training, owners)[places]
    chosen = np.random.default_rng(seed).permutation(len(training))[: len(samples)]
    usual = np.sqrt(_fellows(training, np.sort(chosen))).mean()
    mean = np.sqrt(found.squares).mean()
    ratio = float(mean / usual) if usual > 0.0 else float("nan" if mean == 0.0 else "inf")
    return Copies(float((found.squares < fellows).mean()), ratio)


class Nearest(NamedTuple):
    """For each query [n]: the squared distance to the nearest row, and its place."""

    squares: np.ndarray
    places: np.ndarray


def nearest(queries: np.ndarray, rows: np.ndarray) -> Nearest:
    """Find the nearest row [m d] of each query [n d]."""
    squares, places = np.empty(len(queries)), np.empty(len(queries), np.int64)
    for part, block in squared_distances(queries, rows):
        places[part] = block.argmin(1)
        squares[part] = block.min(1)
    return Nearest(squares, places)


def nearest_distances(
    queries: np.ndarray, rows: np.ndarray, first: int, second: int, *, same: bool
) -> np.ndarray:
    """Find the squared distances to the first-th and second-th nearest row -> [n 2].

    same: query i is row i, which does not count as its own neighbour.
    """
    wanted = sorted({first, second})
    found = np.empty((len(queries), 2))
    for part, block in squared_distances(queries, rows):
        if same:
            block[np.arange(len(block)), np.arange(part.start, part.stop)] = np.inf
        block = np.partition(block, [k - 1 for k in wanted], axis=1)
        found[part] = block[:, [first - 1, second - 1]]
    return found


def squared_distances(queries: np.ndarray, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (which queries, their squared distances to all rows [_ m]) in float64.

    The mean of the rows is subtracted first, which keeps digits where features are far from 0.
    """
    centre = rows.mean(0, dtype=np.float64)
    rows = rows - centre
    norms = (rows**2).sum(1)
    step = max(1, _BLOCK // max(len(rows), rows.shape[1]))
    for first in range(0, len(queries), step):
        part = slice(first, min(first + step, len(queries)))
        block = queries[part] - centre
        squares = (block**2).sum(1)[:, None] + norms[None] - 2.0 * (block @ rows.T)
        yield part, np.maximum(squares, 0.0)


def _fellows(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Find the squared distance of the chosen rows to the nearest other row."""
    found = np.empty(len(chosen))
    for part, block in squared_distances(rows[chosen], rows):
        block[np.arange(len(block)), chosen[part]] = np.inf
        found[part] = block.min(1)
    return found
