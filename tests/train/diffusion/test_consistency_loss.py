"""Consistency training's loss: data whose paths are known, and a network that learns some."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.two_numbers import SHAPE, check_moments, evaluate, perceptron, train

from diffusion_jax.diffusion import preconditioning, samplers, sigma_sampling
from diffusion_jax.diffusion.samplers import sigmas
from diffusion_jax.train.diffusion.consistency_loss import consistency_loss_fn, neighbours

SCALING = preconditioning.consistency()
LEVELS = sigma_sampling.lognormal(p_mean=-1.1, p_std=2.0)


def make(apply, **options):
    given: dict[str, Any] = dict(scaling=SCALING, sigma_of=LEVELS, batch_size=8, total_steps=100)
    return consistency_loss_fn(
        apply,
        lambda *args, **options: {},
        lambda _, batch, __: batch["image"],
        **given | options,
    )


def test_all_data_at_one_point_have_a_loss_of_zero():
    """The path is a straight line, so that f = point + sigma_min / sigma (x - point)."""

    def exact(params, x, c_noise, conditioning, dropout_key):
        sigma = jnp.exp(4.0 * c_noise)
        x = x / SCALING(sigma).c_in[:, None, None, None]
        image = 0.4 + (0.002 / sigma)[:, None, None, None] * (x - 0.4)
        return preconditioning.output_from_start(SCALING, image, x, sigma)

    def value(image, step):
        keys = jax.random.split(jax.random.key(0), 8)
        batch = {"image": image, "position": jnp.arange(8), "step": jnp.full((8,), step)}
        return make(exact)({}, {}, {}, batch, keys, train=True)[0]

    image = jnp.full((8, 2, 2, 1), 0.4)
    np.testing.assert_allclose(value(image, 0), 0.0, atol=1e-3)
    assert value(image + 0.1, 0) > 0.02


@pytest.mark.parametrize(("step", "stretches"), [(0, 10), (24, 10), (25, 20), (75, 80), (999, 80)])
def test_the_grid_doubles_after_equal_shares_of_the_training(step, stretches):
    seen = []

    def spy(params, x, c_noise, conditioning, dropout_key):
        seen.append(np.exp(4.0 * np.asarray(c_noise, np.float64)))
        return x

    keys = lambda seed: jax.random.split(jax.random.key(seed), 8)
    batch = {"image": jnp.zeros((8, 1, 1, 2)), "position": jnp.arange(8)}
    loss_fn = make(spy, num_levels=(10, 80))
    loss_fn({}, {}, {}, batch | {"step": jnp.full((8,), step)}, keys(0), train=True)
    grid = sigmas.edm(stretches + 1)[:-1]
    for levels in seen:
        np.testing.assert_allclose(np.abs(levels[:, None] / grid - 1.0).min(axis=1), 0.0, atol=1e-3)
    places = [np.abs(levels[:, None] / grid - 1.0).argmin(axis=1) for levels in seen]
    np.testing.assert_array_equal(places[0] + 1, places[1])
    seen.clear()
    loss_fn({}, {}, {}, batch, keys(1), train=False)  # evaluation is on the finest grid
    fine = sigmas.edm(81)[:-1]
    np.testing.assert_allclose(np.abs(seen[0][:, None] / fine - 1.0).min(axis=1), 0.0, atol=1e-3)


def test_neighbours_are_around_a_level():
    sigma = jnp.asarray([1e-4, 0.002, 0.3, 79.0, 500.0])
    low, high = neighbours(sigma, jnp.full((5,), 20), 0.002, 80.0)
    grid = sigmas.edm(21)[:-1]
    place = int(np.flatnonzero(grid <= 0.3)[0])
    np.testing.assert_allclose(low, [0.002, 0.002, grid[place], grid[1], grid[1]], rtol=1e-4)
    np.testing.assert_allclose(high, [grid[-2], grid[-2], grid[place - 1], 80.0, 80.0], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size = 0 should be at least 1"),
        (dict(num_levels=(80, 10)), r"num_levels = \(80, 10\) should be at least 2 and in order"),
        (dict(sigma_max=0.001), "sigma_max = 0.001 should be positive and in"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(lambda *args: args[1], **options)


@pytest.mark.slow
def test_a_small_network_learns_to_draw_a_gaussian_in_one_step_and_in_two():
    def apply(params, x, c_noise, conditioning, dropout_key):
        return evaluate(params, x, c_noise)

    loss_fn = make(apply, batch_size=256, total_steps=800, num_levels=(10, 160), stratified=True)
    params = train(loss_fn, perceptron(jax.random.key(2), 3), 800)
    network = lambda x, level, conditioning: apply(params, x, level, conditioning, None)
    denoise = preconditioning.denoiser(network, SCALING)
    keys = jax.random.split(jax.random.key(5), 20000)
    for num_steps in (1, 2):
        sampler = samplers.consistency(sigmas.consistency(num_steps))
        noise = samplers.initial_noise(keys, SHAPE)
        x_T = samplers.start_from_noise(sampler, noise)
        predict = lambda x, sigma: denoise(x, sigma, {})
        check_moments(samplers.sample(sampler, predict, x_T, keys).x)
