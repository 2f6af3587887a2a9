"""Confidence intervals that hold the truth 95 times in 100, and changes on the same noise."""

import numpy as np
import pytest
from scipy import stats

from diffusion_jax.metrics.intervals import change, interval

RANDOM = np.random.default_rng(0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    drawn = RANDOM.exponential(2.0, (200, 1000))  # 1000 experiments of 200 values, mean 2
    found = interval(drawn.astype(np.float32))
    held = np.abs(found.mean - 2.0) <= found.half_width
    assert stats.binomtest(int(held.sum()), 1000, 0.95).pvalue > 0.001
    np.testing.assert_allclose(
        found.half_width, stats.norm.ppf(0.975) * stats.sem(drawn), rtol=1e-5
    )


def test_a_small_change_is_seen_on_the_same_noise():
    before = RANDOM.exponential(1.0, (64, 3))
    after = before * 0.97
    found = change(before, after)
    np.testing.assert_allclose(found.mean, -0.03 * before.mean(0), rtol=1e-9)
    assert (found.mean + found.half_width < 0).all()
    apart = interval(after).half_width + interval(before).half_width
    assert (apart > 10 * found.half_width).all()


def test_too_few_and_other_shapes_are_said():
    with pytest.raises(ValueError, match="1 values should be at least 2"):
        interval(np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) should have the shape \(2, 2\)"):
        change(np.ones((2, 2)), np.ones((3, 2)))
