"""Noise between two seeds: on the great circle, as strong as noise is, exact at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import driver
from diffusion_jax.diffusion.samplers.variation import (
    Variation,
    slerp,
    varied_start,
    varied_steps,
)
from diffusion_jax.randomness import sample_keys

SHAPE = (4, 5, 2)


def keys(seed):
    return sample_keys(jax.random.key(seed), jnp.arange(3))


def flat(values):
    return np.asarray(values, np.float64).reshape(len(values), -1)


def angles(one, other):
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.arccos(np.sum(one * other, axis=1) / norms)


def test_norms_and_angles_are_interpolated():
    one, other = (driver.initial_noise(keys(seed), SHAPE) for seed in (0, 1))
    strength = jnp.array([0.1, 0.5, 0.9])
    a, b, found = map(flat, (one, other, slerp(one, other, strength)))
    s = np.asarray(strength, np.float64)
    want = (1 - s) * np.linalg.norm(a, axis=1) + s * np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), want, rtol=1e-6)
    np.testing.assert_allclose(angles(a, found), s * angles(a, b), rtol=1e-5)
    np.testing.assert_allclose(angles(found, b), (1 - s) * angles(a, b), rtol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_parallel_vectors_are_joined_by_a_line(factor):
    one = driver.initial_noise(keys(0), SHAPE)
    found = slerp(one, factor * one, jnp.full(3, 0.25))
    np.testing.assert_allclose(found, (0.75 + 0.25 * factor) * one, rtol=1e-5)


def test_both_ends_are_the_noise_of_their_seeds():
    found = varied_start(keys(0), Variation(keys(1), jnp.array([0.0, 1.0, 0.5])), SHAPE)
    one, other = (driver.initial_noise(keys(seed), SHAPE) for seed in (0, 1))
    np.testing.assert_allclose(found[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], other[1], rtol=1e-5, atol=1e-6)
    assert np.abs(found[2] - one[2]).max() > 0.1


def stochastic(steps):
    """A sampler that adds the noise of its steps, and one segment of it."""

    def step(predict, x, memory, coefficients, noise):
        return x + noise, memory, x

    return driver.Sampler(lambda x: None, step, {"t": np.arange(steps)}, stochastic=True)


def nothing(x, t):
    return x


def test_noise_of_steps_is_varied_in_the_same_way():
    sampler, zeros = stochastic(3), jnp.zeros((3, *SHAPE))
    alone = [driver.sample(sampler, nothing, zeros, keys(seed)).x for seed in (0, 1)]
    for strength, want in ((0.0, alone[0]), (1.0, alone[1])):
        noise = varied_steps(sampler, keys(0), Variation(keys(1), jnp.full(3, strength)), SHAPE)
        found = driver.sample(sampler, nothing, zeros, keys(0), step_noise=noise).x
        np.testing.assert_allclose(found, want, atol=1e-5)
    part = driver.segment(sampler, 1, 3)
    half = Variation(keys(1), jnp.full(3, 0.5))
    whole, rest = (varied_steps(s, keys(0), half, SHAPE) for s in (sampler, part))
    np.testing.assert_allclose(whole[1:], rest, rtol=1e-6)


def test_a_sampler_without_noise_needs_none():
    still = stochastic(3)._replace(stochastic=False)
    assert varied_steps(still, keys(0), Variation(keys(1), jnp.ones(3)), SHAPE) is None
