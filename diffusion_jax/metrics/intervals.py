"""Means of losses with 95 % confidence intervals, and of how they changed on the same noise."""

from typing import NamedTuple

import numpy as np

# A normal distribution lies within so many standard deviations with a probability of 95 %.
Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """Means [...] with the half widths of their 95 % confidence intervals."""

    mean: np.ndarray
    half_width: np.ndarray


def interval(values: np.ndarray) -> Interval:
    """Compute the mean over the first axis of values [n ...] and its interval, in float64.

    The mean of n values is taken as normal, which about 30 of them make true.
    Raises ValueError for fewer than 2 values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values should be at least 2 for a confidence interval")
    values = values.astype(np.float64)
    return Interval(values.mean(0), Z_95 * values.std(0, ddof=1) / np.sqrt(n))


def change(before: np.ndarray, after: np.ndarray) -> Interval:
    """Compute the mean change of losses [n ...] of the same samples with the same noise.

    What samples and noise have in common cancels, so that the interval is far narrower than the
    intervals of both means.
    Raises ValueError for different shapes and for fewer than 2 values.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"losses of shape {after.shape} should have the shape {before.shape} of those before"
        )
    return interval(after.astype(np.float64) - before)
