"""What neighbours tell, on sets whose answers can be counted by hand, and against plain loops."""

import numpy as np
import pytest

from diffusion_jax.metrics.neighbours import copies, manifold

RANDOM = np.random.default_rng(0)


def by_loops(samples, data, k, dense):
    def ball(rows, k):
        return [sorted(np.linalg.norm(r - o) for o in rows)[k] for r in rows]

    gaps = np.array([[np.linalg.norm(s - d) for d in data] for s in samples])
    near, far, theirs = ball(data, k), ball(data, dense), ball(samples, k)
    return (
        np.mean([any(row <= near) for row in gaps]),
        np.mean([any(column <= theirs) for column in gaps.T]),
        np.mean([sum(row < far) for row in gaps]) / dense,
        np.mean([any(column < r) for column, r in zip(gaps.T, far, strict=True)]),
    )


def test_all_four_by_their_definitions():
    samples, data = RANDOM.standard_normal((30, 3)) + 1.0, RANDOM.standard_normal((40, 3))
    np.testing.assert_allclose(manifold(samples, data), by_loops(samples, data, 3, 5))


def test_equal_distributions_score_high_and_far_ones_nothing():
    data = RANDOM.standard_normal((300, 3))
    near = manifold(RANDOM.standard_normal((300, 3)), data)
    assert near.precision > 0.8 and near.recall > 0.8 and near.coverage > 0.8
    assert near.density == pytest.approx(1.0, abs=0.15)
    assert manifold(data + 100.0, data) == (0.0, 0.0, 0.0, 0.0)


def test_a_mode_that_is_missing_costs_recall_and_coverage_alone():
    modes = np.array([[0.0, 0.0], [50.0, 0.0]])
    data = modes[np.arange(200) % 2] + RANDOM.standard_normal((200, 2))
    found = manifold(RANDOM.standard_normal((200, 2)), data)
    assert found.precision > 0.8
    assert found.recall < 0.55 and found.coverage < 0.55


def test_copies_are_seen_and_new_samples_are_not():
    training = RANDOM.standard_normal((500, 8)) + 1000.0
    fresh = copies(RANDOM.standard_normal((400, 8)) + 1000.0, training)
    assert fresh.ratio == pytest.approx(1.0, abs=0.05) and fresh.copied < 0.6
    copied = copies(training[:400] + 0.001 * RANDOM.standard_normal((400, 8)), training)
    assert copied.ratio < 0.01 and copied.copied == 1.0
    half = np.concatenate([training[:200], RANDOM.standard_normal((200, 8)) + 1000.0])
    assert fresh.copied < copies(half, training).copied < 1.0


def test_too_few_are_said():
    with pytest.raises(ValueError, match="5 samples are too few for 5 neighbours.*at least 6"):
        manifold(np.ones((5, 2)), np.ones((9, 2)))
    with pytest.raises(ValueError, match="1 training records should be at least 2"):
        copies(np.ones((5, 2)), np.ones((1, 2)))
