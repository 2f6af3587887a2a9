"""Norms: their statistics in closed form, and their backward passes against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers.norm import group_norm, layer_norm


def normalised(x, groups, epsilon=1e-5):
    """GroupNorm in float64, two passes."""
    grouped = np.asarray(x, np.float64).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = np.square(grouped - mean).mean((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)


def plain_norm(x, groups):
    ones = jnp.ones((x.shape[0], x.shape[-1]))
    return group_norm(x, ones, 0.0 * ones, num_groups=groups, epsilon=1e-5)


@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (3, 16, 8), (2, 2, 3, 4, 8)])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_group_norm_normalises_positions_and_groups(shape, groups):
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_allclose(plain_norm(x, groups), normalised(x, groups), atol=2e-6)


@pytest.mark.parametrize(("mean", "tolerance"), [(100.0, 1e-5), (1e4, 2e-3)])
def test_group_norm_survives_a_mean_far_above_the_deviation(mean, tolerance):
    x = mean + jax.random.normal(jax.random.key(0), (2, 28, 28, 32))
    # E[x^2] - E[x]^2 is off by 1e-3 at mean 100 and by more than 1 at mean 1e4.
    np.testing.assert_allclose(plain_norm(x, 8), normalised(x, 8), atol=tolerance)


def test_group_norm_of_channels_with_unlike_means():
    x = (
        jax.random.normal(jax.random.key(0), (2, 6, 6, 16))
        + 50.0 * jnp.arange(16.0)[None, None, None]
    )
    np.testing.assert_allclose(plain_norm(x, 4), normalised(x, 4), atol=1e-5)


def test_group_norm_of_a_constant_is_its_bias():
    x = jnp.full((2, 4, 4, 8), 7.25)
    bias = jnp.arange(16.0).reshape(2, 8)
    h = group_norm(x, jnp.ones((2, 8)), bias, num_groups=2, epsilon=1e-5)
    np.testing.assert_allclose(h, jnp.broadcast_to(bias[:, None, None], x.shape), atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (3, 10, 8)])
@pytest.mark.parametrize("silu", [False, True])
def test_backward_pass_is_the_derivative_in_float64(shape, silu):
    keys = jax.random.split(jax.random.key(0), 4)
    x = 30.0 + 2.0 * jax.random.normal(keys[0], shape)
    gain, bias = jax.random.normal(keys[1], (2, shape[0], 8))
    cotangent = jax.random.normal(keys[2], shape)
    step = jax.random.normal(keys[3], shape)

    def ours(x, gain, bias):
        h = group_norm(x, gain, bias, num_groups=2, epsilon=1e-5, silu=silu)
        return jnp.sum(h * cotangent)

    def formula(x, gain, bias):
        axes = (shape[0],) + (1,) * (len(shape) - 2) + (8,)
        h = normalised(x, 2) * gain.reshape(axes) + bias.reshape(axes)
        return np.sum((h / (1.0 + np.exp(-h)) if silu else h) * cotangent64)

    x64, gain64, bias64, cotangent64, step64 = (
        np.asarray(a, np.float64) for a in (x, gain, bias, cotangent, step)
    )
    dx, dgain, dbias = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(x, gain, bias)
    tiny = 1e-5
    there, back = (formula(x64 + s * tiny * step64, gain64, bias64) for s in (1, -1))
    np.testing.assert_allclose(jnp.sum(dx * step), (there - back) / (2 * tiny), rtol=1e-4)
    for gradient, moved in (
        (dgain, lambda s: (x64, gain64 + s, bias64)),
        (dbias, lambda s: (x64, gain64, bias64 + s)),
    ):
        for index in ((0, 0), (1, 5)):
            bump = np.zeros_like(gain64)
            bump[index] = tiny
            slope = (formula(*moved(bump)) - formula(*moved(-bump))) / (2 * tiny)
            np.testing.assert_allclose(gradient[index], slope, rtol=1e-4, atol=1e-5)


def test_gradient_of_half_precision_has_its_dtype():
    x = jnp.ones((2, 4, 8), jnp.bfloat16)
    ones = jnp.ones((2, 8))
    norm = lambda x: group_norm(x, ones, ones, num_groups=2, epsilon=1e-5)
    assert norm(x).dtype == jnp.float32
    assert jax.grad(lambda x: norm(x).sum())(x).dtype == jnp.bfloat16


def layer_normalised(x, gain, bias):
    """LayerNorm in float64."""
    deviation = x - x.mean(-1, keepdims=True)
    return deviation / np.sqrt(np.square(deviation).mean(-1, keepdims=True) + 1e-5) * gain + bias


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_layer_norm_and_its_derivative_in_float64(mean):
    keys = jax.random.split(jax.random.key(0), 6)
    x = mean + 2.0 * jax.random.normal(keys[0], (3, 5, 16))
    gain, bias = jax.random.normal(keys[1], (2, 16))
    cotangent = jax.random.normal(keys[2], x.shape)
    arrays = tuple(np.asarray(a, np.float64) for a in (x, gain, bias))
    np.testing.assert_allclose(
        layer_norm(x, gain, bias, 1e-5), layer_normalised(*arrays), rtol=1e-4, atol=1e-4
    )
    ours = jax.grad(lambda *a: jnp.sum(layer_norm(*a, 1e-5) * cotangent), argnums=(0, 1, 2))
    for i, gradient in enumerate(ours(x, gain, bias)):
        step = np.asarray(jax.random.normal(keys[3 + i], gradient.shape))
        there, back = (
            np.sum(
                layer_normalised(*(a + s * step * (i == j) for j, a in enumerate(arrays)))
                * np.asarray(cotangent, np.float64)
            )
            for s in (1e-5, -1e-5)
        )
        slope = (there - back) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=2e-4, atol=1e-4)


def test_layer_norm_keeps_its_input_alone():
    x = jax.ShapeDtypeStruct((2, 64, 32), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((32,), jnp.float32)
    _, kept = jax.eval_shape(
        lambda *a: jax.vjp(lambda *b: layer_norm(*b, 1e-5), *a), x, weight, weight
    )
    large = [leaf for leaf in jax.tree.leaves(kept) if leaf.size >= 2 * 64 * 32]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]
