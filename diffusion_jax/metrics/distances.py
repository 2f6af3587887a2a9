"""Distances between two sets of features, in NumPy's float64; 0 for equal distributions."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from diffusion_jax.metrics.statistics import Moments
from diffusion_jax.wording import counted

Rows: TypeAlias = np.ndarray
# Directions of MIND that are projected on at once, which bounds the memory.
_DIRECTIONS = 128


class Estimate(NamedTuple):
    """A mean over parts of the samples, and its standard error; None for a single part."""

    value: float
    error: float | None


def frechet(one: Moments, other: Moments) -> float:
    """Compute the Frechet distance of two Gaussians with these moments.

    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)); with the features of Inception-v3 it is the
    FID. The trace of the root is found by two symmetric eigenvalue problems, so it needs no
    regularisation where there are fewer samples than features.
    Raises ValueError for features of different widths. Source: Heusel et al. 2017, equation 6.
    """
    check_widths(one.mean, other.mean)
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ other.covariance @ root)
    covariances = np.trace(one.covariance) + np.trace(other.covariance)
    means = np.sum((one.mean - other.mean) ** 2)
    return float(means + covariances - 2.0 * np.sqrt(np.maximum(product, 0.0)).sum())


def kernel(one: Rows, other: Rows, *, block: int = 1000, seed: int = 0) -> Estimate:
    """Estimate the squared MMD of rows [n d], [m d] with the kernel (x y / d + 1)^3.

    With the features of Inception-v3 it is the KID. Both sets are shuffled and split into blocks of
    at most `block` rows; each pair of blocks gives an unbiased estimate, and their mean is
    returned. Every row counts once, where other packages draw blocks with repetition.
    Raises ValueError for fewer than 2 rows. Source: Binkowski et al. 2018, section 4.
    """
    width = one.shape[1]

    def cubic(x: Rows, y: Rows) -> Rows:
        return (x @ y.T / width + 1.0) ** 3

    return _blocks(one, other, cubic, block, seed)


def gaussian_kernel(
    one: Rows, other: Rows, *, sigma: float = 10.0, scale: float = 1000.0, block: int = 1000
) -> Estimate:
    """Estimate scale times the squared MMD with the kernel exp(-|x - y|^2 / (2 sigma^2)).

    Rows are divided by their norms, as embeddings of CLIP are. With CLIP ViT-L/14 at 336 pixels it
    is the CMMD. Estimated in blocks as `kernel` does.
    Source: Jayasumana et al. 2024, "Rethinking FID", section 4.
    """

    def gaussian(x: Rows, y: Rows) -> Rows:
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2.0 * x @ y.T
        return np.exp(-squares / (2.0 * sigma**2))

    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, other))
    found = _blocks(one, other, gaussian, block, seed=0)
    error = None if found.error is None else scale * found.error
    return Estimate(scale * found.value, error)


def mind(one: Rows, other: Rows, *, directions: int = 1024, seed: int = 0) -> float:
    """Compute the sliced 2-Wasserstein distance, squared, of rows [n d] and [m d].

    It is the mean over random unit vectors u of W_2^2(u x, u y), each found by sorting; sets of
    different sizes are compared exactly. No factor is applied. The directions come from the seed.
    Raises ValueError for features of different widths.
    Source: Berthet et al. 2026, "Monge Inception Distance" (arXiv 2605.06797).
    """
    check_widths(one[0], other[0])
    if directions < 1:
        raise ValueError(f"directions = {directions} should be at least 1")
    random = np.random.default_rng(seed)
    left, right, weights = _transport(len(one), len(other))
    total = 0.0
    for first in range(0, directions, _DIRECTIONS):
        count = min(_DIRECTIONS, directions - first)
        units = random.standard_normal((count, one.shape[1])).T
        units /= np.linalg.norm(units, axis=0, keepdims=True)
        x, y = (np.sort(rows.astype(np.float64) @ units, axis=0) for rows in (one, other))
        total += float((weights @ (x[left] - y[right]) ** 2).sum())
    return total / directions


def check_widths(one: np.ndarray, other: np.ndarray) -> None:
    """Raise ValueError unless both have features of the same width."""
    if np.shape(one) != np.shape(other):
        raise ValueError(
            f"the samples have features of width {np.size(one)} and the reference of width "
            f"{np.size(other)}; both should come from the same network"
        )


def _transport(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the optimal plan of n and m sorted points: which pairs, and the mass of each.

    Quantiles are counted in units of 1 / (n m), so that no rounding can join wrong pairs.
    """
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    starts = np.concatenate([[0], ends[:-1]])
    return starts // m, starts // n, (ends - starts) / (n * m)


def _blocks(
    one: Rows, other: Rows, of: Callable[[Rows, Rows], Rows], block: int, seed: int
) -> Estimate:
    check_widths(one[0], other[0])
    size = min(len(one), len(other), block)
    if size < 2:
        raise ValueError(
            f"{counted(size, 'sample is', 'samples are')} too few for an MMD; there "
            "should be at least 2"
        )
    count = min(len(one), len(other)) // size
    random = np.random.default_rng(seed)
    parts = [
        random.permutation(len(rows))[: count * size].reshape(count, size) for rows in (one, other)
    ]
    found = [
        _mmd(one[x].astype(np.float64), other[y].astype(np.float64), of)
        for x, y in zip(*parts, strict=True)
    ]
    error = float(np.std(found, ddof=1) / np.sqrt(count)) if count > 1 else None
    return Estimate(float(np.mean(found)), error)


def _mmd(x: Rows, y: Rows, of: Callable[[Rows, Rows], Rows]) -> float:
    """Estimate the squared MMD of n rows each, without bias.

    Source: Gretton et al. 2012, lemma 6.
    """
    n = len(x)
    same = sum(k.sum() - np.trace(k) for k in (of(x, x), of(y, y)))
    return float(same / (n * (n - 1)) - 2.0 * of(x, y).mean())
