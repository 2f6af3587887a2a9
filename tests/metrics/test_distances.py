"""Distances in closed form (two Gaussians), against SciPy, and under what makes samples worse."""

import numpy as np
import pytest
from scipy import linalg, optimize, stats

from diffusion_jax.metrics import distances
from diffusion_jax.metrics.statistics import Moments

RANDOM = np.random.default_rng(0)


def gaussian(d, seed):
    random = np.random.default_rng(seed)
    root = random.standard_normal((d, d)) / np.sqrt(d)
    return Moments(1000, random.standard_normal(d), root @ root.T)


def test_frechet_is_the_formula_with_scipys_root():
    one, other = gaussian(6, 1), gaussian(6, 2)
    root = linalg.sqrtm(one.covariance @ other.covariance).real
    expected = np.sum((one.mean - other.mean) ** 2) + np.trace(
        one.covariance + other.covariance - 2 * root
    )
    assert distances.frechet(one, other) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet(one, one) == pytest.approx(0.0, abs=1e-9)


def test_frechet_of_fewer_samples_than_features_is_finite_and_right():
    rows = RANDOM.standard_normal((4, 9))
    singular = Moments(4, rows.mean(0), np.cov(rows, rowvar=False))
    wide = Moments(9, np.zeros(9), np.eye(9))
    values = np.linalg.eigvalsh(singular.covariance).clip(0)
    expected = np.sum(singular.mean**2) + np.sum((np.sqrt(values) - 1) ** 2)
    # zeros among the eigenvalues come out as 1e-16, whose roots are 1e-8
    assert distances.frechet(singular, wide) == pytest.approx(expected, rel=1e-7)


def test_kernel_of_two_gaussians():
    """With x = y = N(m, s^2) in one dimension, E (x y + 1)^3 is a polynomial in the moments."""

    def expected_kernel(m, s, n, t):
        first = [1.0, m, m**2 + s**2, m**3 + 3 * m * s**2]
        second = [1.0, n, n**2 + t**2, n**3 + 3 * n * t**2]
        return sum(c * a * b for c, a, b in zip([1, 3, 3, 1], first, second, strict=True))

    x, y = 0.3 + 0.5 * RANDOM.standard_normal((8000, 1)), RANDOM.standard_normal((8000, 1))
    expected = (
        expected_kernel(0.3, 0.5, 0.3, 0.5)
        + expected_kernel(0, 1, 0, 1)
        - 2 * expected_kernel(0.3, 0.5, 0, 1)
    )
    found = distances.kernel(x, y)
    assert found.error < 0.2 * expected
    assert abs(found.value - expected) < 4 * found.error


def test_kernel_has_no_bias():
    """Equal distributions give 0 within the error, of few samples too."""
    values = [
        distances.kernel(*np.random.default_rng(seed).standard_normal((2, 20, 4))).value
        for seed in range(400)
    ]
    assert abs(np.mean(values)) < 4 * stats.sem(values)


def test_gaussian_kernel_by_the_definition():
    x, y = RANDOM.standard_normal((2, 8, 5))
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))

    def mean(a, b, same):
        pairs = [
            np.exp(-np.sum((p - q) ** 2) / 200)
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and i == j)
        ]
        return np.mean(pairs)

    expected = 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))
    found = distances.gaussian_kernel(3 * x, 5 * y)
    assert found.error is None
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_mind_of_shifted_and_scaled_samples():
    """For y = s x + m, the mean over directions is (|m|^2 + (s - 1)^2 |x - mean|^2) / d."""
    x = RANDOM.standard_normal((500, 4))
    shift = np.array([1.0, 2.0, 0.0, -1.0])
    centred = x - x.mean(0)
    found = distances.mind(centred, centred + shift, directions=20_000)
    assert found == pytest.approx(np.sum(shift**2) / 4, rel=0.02)
    found = distances.mind(centred, 3 * centred, directions=20_000)
    assert found == pytest.approx(4 * np.sum(centred**2) / 500 / 4, rel=0.02)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 4), (3, 10)])
def test_mind_in_one_dimension_is_the_optimal_transport(n, m):
    """In one dimension both directions, 1 and -1, give W_2^2, here by an assignment of copies."""
    x, y = RANDOM.standard_normal((n, 1)), RANDOM.standard_normal((m, 1))
    copies = np.repeat(x, m, 0), np.repeat(y, n, 0)
    cost = (copies[0] - copies[1].T) ** 2
    expected = cost[optimize.linear_sum_assignment(cost)].mean()
    assert distances.mind(x, y, directions=2) == pytest.approx(expected, rel=1e-9)


def test_the_order_of_the_samples_does_not_matter():
    x, y = RANDOM.standard_normal((2, 40, 3))
    mixed = RANDOM.permutation(x)
    assert distances.mind(mixed, y) == pytest.approx(distances.mind(x, y), rel=1e-12)
    # one block holds all of them
    assert distances.kernel(mixed, y).value == pytest.approx(distances.kernel(x, y).value, rel=1e-9)


@pytest.mark.parametrize("distance", [distances.mind, distances.kernel, distances.gaussian_kernel])
def test_features_of_another_network_are_refused(distance):
    with pytest.raises(ValueError, match="width 3 and the reference of width 4"):
        distance(np.ones((5, 3)), np.ones((5, 4)))


def test_one_sample_is_too_few_for_an_mmd():
    with pytest.raises(ValueError, match="1 sample is too few for an MMD"):
        distances.kernel(np.ones((1, 3)), np.ones((5, 3)))


def distances_of(x, y):
    moments = [Moments(len(a), a.mean(0), np.cov(a, rowvar=False)) for a in (x, y)]
    return {
        "frechet": distances.frechet(*moments),
        "kernel": distances.kernel(x, y).value,
        "mind": distances.mind(x, y),
    }


@pytest.mark.parametrize("harm", ["noise", "blur", "a mode less"])
def test_they_grow_when_samples_get_worse(harm):
    random = np.random.default_rng(5)
    modes = 3 * random.standard_normal((4, 6))

    def drawn(count):
        return modes[random.integers(count, size=1000)] + random.standard_normal((1000, 6))

    data, good, bad = drawn(4), drawn(4), drawn(3 if harm == "a mode less" else 4)
    bad = bad + 2 * random.standard_normal(bad.shape) if harm == "noise" else bad
    bad = 0.6 * bad + 0.4 * bad.mean(0) if harm == "blur" else bad
    before, after = distances_of(good, data), distances_of(bad, data)
    assert all(after[name] > 2 * max(before[name], 0.0) for name in before), (before, after)
