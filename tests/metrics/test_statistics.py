"""Streams against NumPy on all rows at once, whatever the order, the batches and the padding."""

import numpy as np
import pytest
from scipy import stats

from diffusion_jax.metrics.statistics import entropies, keep, mean, moments

ROWS = np.random.default_rng(0).standard_normal((101, 7)).astype(np.float32) + 1e4
IDS = np.arange(101) * 3


def streamed(statistic, rows, ids, size, order=None):
    """Stream in batches of `size`, each padded with rows that must not count."""
    order = np.arange(len(rows)) if order is None else order
    state = statistic.init()
    for first in range(0, len(rows), size):
        chosen = order[first : first + size]
        padding = np.full((2, *rows.shape[1:]), 1e6, rows.dtype)
        batch = np.concatenate([padding[:1], rows[chosen], padding[1:]])
        state = statistic.update(state, batch, np.concatenate([[-1], ids[chosen], [-1]]))
    return statistic.result(state)


@pytest.mark.parametrize("size", [1, 10, 101])
def test_moments_are_numpys_far_from_zero(size):
    found = streamed(moments(), ROWS, IDS, size, np.random.default_rng(1).permutation(101))
    wide = ROWS.astype(np.float64)
    assert found.count == 101
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(wide, rowvar=False), rtol=1e-9, atol=1e-9)


def test_what_is_kept_depends_on_the_records_alone():
    ways = [(1, None), (10, np.random.default_rng(2).permutation(101)), (101, None)]
    kept = [streamed(keep(20), ROWS, IDS, size, order) for size, order in ways]
    for other in kept[1:]:
        np.testing.assert_array_equal(kept[0].ids, other.ids)
        np.testing.assert_array_equal(kept[0].rows, other.rows)
    np.testing.assert_array_equal(kept[0].rows, ROWS[kept[0].ids // 3])
    assert len(streamed(keep(500), ROWS, IDS, 10).ids) == 101


def test_the_choice_is_fair():
    """Every tenth of 10,000 records in a row has its share of 1,000 kept ones."""
    ids = np.arange(10_000)
    kept = streamed(keep(1000), np.zeros((10_000, 1), np.float32), ids, 1000)
    counts = np.histogram(kept.ids, 10, (0, 10_000))[0]
    assert stats.chisquare(counts).pvalue > 0.01


def test_mean_and_its_standard_error():
    value, error = streamed(mean(), ROWS[:, 0], IDS, 10)
    wide = ROWS[:, 0].astype(np.float64)
    np.testing.assert_allclose([value, error], [wide.mean(), stats.sem(wide)], rtol=1e-9)


def test_inception_score_by_its_formula():
    logits = np.random.default_rng(3).standard_normal((100, 5)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = streamed(entropies(10), p, np.arange(100), 7)
    for part in range(10):
        own = p[part::10]
        expected = np.exp(np.mean([stats.entropy(row, own.mean(0)) for row in own]))
        np.testing.assert_allclose(found[part], expected, rtol=1e-12)
    sure = np.eye(5)[np.arange(100) // 10 % 5]  # each part sees all five classes
    np.testing.assert_allclose(streamed(entropies(10), sure, np.arange(100), 7), 5.0)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (moments, "a covariance of 0 samples should have at least 2"),
        (lambda: keep(3), "0 samples were given"),
        (entropies, "0 samples are too few for the 10 parts"),
        (lambda: keep(0), "limit = 0 should be at least 1"),
    ],
)
def test_too_little_is_said(statistic, message):
    with pytest.raises(ValueError, match=message):
        statistic().result(statistic().init())
