"""Rounding at random: neighbours only, no bias, fresh draws, and the numbers that need none."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.train.rounding import round_at_random

# Between 1 and 1 + 2^-7, the next number of bfloat16.
FRACTION = 0.3
BETWEEN = 1.0 + FRACTION * 2**-7


def rounded(tree, step):
    return jax.jit(lambda tree, step: round_at_random(tree, "bfloat16", step))(tree, step)


def test_it_rounds_to_a_neighbour_and_keeps_the_mean():
    x = (
        jnp.full((400, 250), BETWEEN)
        * jnp.array([1.0, -1.0, 2.0**-60, 2.0**80])[jnp.arange(400) % 4, None]
    )
    result = np.asarray(rounded(x, jnp.int32(3)), np.float64)
    scale = np.array([1.0, -1.0, 2.0**-60, 2.0**80])
    for i, row in enumerate(scale):
        up = (result[i::4] / row - 1.0) * 2**7
        assert set(np.unique(up)) == {0.0, 1.0}
        # 25,000 draws: the standard deviation of their mean is 0.0029.
        assert abs(up.mean() - FRACTION) < 0.012


def test_draws_differ_between_steps_leaves_and_places():
    x = jnp.full((64, 64), BETWEEN)
    draws = [
        np.asarray(leaf, np.float32) > 1.0
        for step in (1, 2)
        for leaf in rounded({"a": x, "b": x}, jnp.int32(step)).values()
    ]
    draws += [draws[0].T, np.roll(draws[0], 1, 0), np.roll(draws[0], 1, 1)]
    correlations = np.corrcoef(np.stack([d.ravel() for d in draws]).astype(np.float64))
    assert np.abs(correlations - np.eye(len(draws))).max() < 0.08  # five standard deviations


def test_numbers_of_bfloat16_and_those_that_are_none_stay():
    x = jnp.array([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan, 3.0e38])
    result = rounded(x, jnp.int32(0))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(result[:7], np.float32), x[:7])
    tree = {"a": x}
    assert round_at_random(tree, "float32", jnp.int32(0)) is tree


def test_a_slow_average_moves_where_the_nearest_number_stays():
    target, rate = jnp.ones((100, 100)), 1e-3

    def step(i, averages):
        random, nearest = averages
        moved = lambda a: a + rate * (target - a.astype(jnp.float32))  # noqa: E731
        return round_at_random(moved(random), "bfloat16", i), moved(nearest).astype(jnp.bfloat16)

    start = jnp.full((100, 100), 0.5, jnp.bfloat16)
    random, nearest = jax.jit(lambda a: jax.lax.fori_loop(0, 500, step, a))((start, start))
    expected = 1.0 - 0.5 * (1.0 - rate) ** 500
    assert float(nearest.astype(jnp.float32).mean()) == 0.5
    assert abs(float(random.astype(jnp.float32).mean()) - expected) < 2e-3
