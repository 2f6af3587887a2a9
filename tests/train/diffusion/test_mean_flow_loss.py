"""MeanFlow's training loss: data whose mean velocity is known, and a network that learns some."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.two_numbers import SHAPE, check_moments, evaluate, perceptron, train

from diffusion_jax.diffusion import preconditioning, samplers, sigma_sampling
from diffusion_jax.train.diffusion.mean_flow_loss import mean_flow_loss_fn

SCALING = preconditioning.flow(time_scale=2.0)


def make(apply, embed=lambda *args, **options: {}, **options):
    given: dict[str, Any] = dict(
        scaling=SCALING, sigma_of=sigma_sampling.logit_normal(), batch_size=8
    )
    return mean_flow_loss_fn(apply, embed, lambda _, batch, __: batch["image"], **given | options)


def value(loss_fn, image, train=True):
    keys = jax.random.split(jax.random.key(0), len(image))
    batch = {"image": image, "position": jnp.arange(len(image), dtype=jnp.int32)}
    return loss_fn({}, {}, {}, batch, keys, train=train)[0]


def test_all_data_at_one_point_have_a_loss_of_zero():
    """The path is a straight line to the point, so that u = (z - point) / t, whatever r is."""

    def exact(params, z, level, conditioning, dropout_key):
        return (z - 0.4) / (level / 2.0)[:, None, None, None]

    image = jnp.full((8, 2, 2, 1), 0.4)
    loss = value(make(exact, flow_ratio=0.0, power=0.0), image)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    assert value(make(exact, flow_ratio=0.0, power=0.0), image + 0.1) > 0.01


@pytest.mark.parametrize("ratio", [0.0, 0.75, 1.0])
def test_r_equals_t_for_the_share_that_learns_flow_matching(ratio):
    def jumps(params, z, level, conditioning, dropout_key):
        return jnp.where(conditioning["duration"] > 0.0, 1000.0, 0.0)[:, None, None, None] + 0 * z

    loss_fn = make(jumps, flow_ratio=ratio, power=0.0)
    loss = jax.jit(lambda image: value(loss_fn, image))(jnp.zeros((2000, *SHAPE)))
    np.testing.assert_allclose(loss / 2e6, 1.0 - ratio, atol=0.05)


def test_guidance_is_learned_but_not_where_the_condition_was_dropped():
    """The network predicts 1 for every label but the null class 9; all images are 0."""
    labels, seen = jnp.asarray([9, 1, 2, 9, 3, 4, 5, 6]), {}

    def predict(params, z, level, conditioning, dropout_key):
        if not isinstance(z, jax.core.Tracer):
            seen.update(noise=z / (level / 2.0)[:, None, None, None])
        return jnp.where(conditioning["vector"] == 9, 0.0, 1.0)[:, None, None, None] + 0.0 * z

    def embed(params, frozen, batch, keys, unconditional=False):
        return {"vector": jnp.full((8,), 9) if unconditional else labels}

    loss_fn = make(predict, embed, power=0.0, flow_ratio=1.0, guidance_scale=3.0)
    found = value(loss_fn, jnp.zeros((8, *SHAPE)))
    dropped = np.asarray(labels == 9)[:, None, None, None]
    error = np.where(dropped, 0.0, 1.0) - np.where(dropped, 1.0, 3.0) * np.asarray(seen["noise"])
    np.testing.assert_allclose(found, np.mean(np.sum(error**2, axis=(1, 2, 3))), rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_small_network_learns_to_draw_a_gaussian_in_few_steps(trained, num_steps):
    def denoise(x, sigma, end):
        c = SCALING(sigma)
        z, level = c.c_in[:, None, None, None] * x, c.c_noise
        u = evaluate(trained, z, level, level - SCALING(end).c_noise)
        return z - (level / 2.0)[:, None, None, None] * u

    keys = jax.random.split(jax.random.key(5), 20000)
    sampler = samplers.mean_flow(samplers.sigmas.flow(num_steps))
    noise = samplers.initial_noise(keys, SHAPE)
    x = samplers.sample(sampler, denoise, samplers.driver.start_from_noise(sampler, noise), keys).x
    check_moments(x)


@pytest.fixture(scope="module")
def trained():
    def apply(params, z, level, conditioning, dropout_key):
        return evaluate(params, z, level, conditioning["duration"])

    # For two numbers with noise, weights that depend on the error would change the mean.
    options: dict[str, Any] = dict(flow_ratio=0.5, power=0.0, stratified=True)
    uniform = sigma_sampling.uniform_time()
    loss_fn = make(apply, batch_size=256, sigma_of=uniform, **options)
    return train(loss_fn, perceptron(jax.random.key(2), 4), 1500)
