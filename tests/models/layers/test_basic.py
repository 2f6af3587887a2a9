"""Layers: statistics in closed form, PyTorch's padding and initialisation, timestep embedding."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers.basic import (
    Downsample,
    GroupNorm,
    Upsample,
    average_pool,
    conv,
    dense,
    timestep_embedding,
    torch_uniform,
)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_gradients(silu, modulated):
    """Against differentiating the two-pass formula."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    x = 2.0 + jax.random.normal(next(keys), (2, 3, 4, 8))
    scale, shift = jax.random.normal(next(keys), (2, 2, 8))
    params = {"scale": jax.random.normal(next(keys), 8), "bias": jax.random.normal(next(keys), 8)}
    cotangent = jax.random.normal(next(keys), x.shape)
    extra = (scale, shift) if modulated else ()

    def ours(params, x, *extra):
        module = GroupNorm(num_groups=2, silu=silu)
        return jnp.sum(module.apply({"params": params}, x, *extra) * cotangent)

    def formula(params, x, *extra):
        grouped = x.reshape(2, 12, 2, 4)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
        h = ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
        h = h * params["scale"][None, None, None] + params["bias"][None, None, None]
        if extra:
            h = h * (1.0 + extra[0][:, None, None]) + extra[1][:, None, None]
        return jnp.sum((jax.nn.silu(h) if silu else h) * cotangent)

    wanted = tuple(range(2 + len(extra)))
    mine, theirs = (
        jax.jit(jax.value_and_grad(f, argnums=wanted))(params, x, *extra) for f in (ours, formula)
    )
    for left, right in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-5)


def test_group_norm_computes_half_precision_in_float32():
    x = (20.0 + jax.random.normal(jax.random.key(0), (2, 16, 16, 8))).astype(jnp.bfloat16)
    module = GroupNorm(num_groups=2, dtype=jnp.bfloat16)
    h, variables = module.init_with_output(jax.random.key(0), x)
    assert h.dtype == jnp.bfloat16 and variables["params"]["scale"].dtype == jnp.float32
    grouped = np.asarray(x, np.float64).reshape(2, -1, 2, 4)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    wanted = (centred / centred.std((1, 3), keepdims=True)).reshape(x.shape)
    np.testing.assert_allclose(h.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-4)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_groups = 3 does not divide the 8 channels"):
        GroupNorm(num_groups=3).init(jax.random.key(0), jnp.ones((1, 2, 2, 8)))


@pytest.mark.parametrize(
    ("make", "shape", "fan_in"),
    [(lambda: conv(8, 64), (1, 4, 4, 8), 72), (lambda: dense(50, 90), (1, 50), 50)],
)
def test_weights_and_biases_start_uniform_as_in_torch(make, shape, fan_in):
    params = make().init(jax.random.key(0), jnp.ones(shape))["params"]
    bound = 1 / math.sqrt(fan_in)
    for name, values in params.items():
        assert 0.9 * bound < jnp.abs(values).max() <= bound, name
    kernel = params["kernel"]
    assert abs(kernel.std() * math.sqrt(3) / bound - 1) < 0.05 and abs(kernel.mean()) < 0.05 * bound


def test_zero_layers_start_at_zero():
    for layer, shape in ((conv(8, 4, zero=True), (1, 2, 2, 8)), (dense(8, 4, zero=True), (1, 8))):
        params = layer.init(jax.random.key(0), jnp.ones(shape))["params"]
        assert set(params) == {"kernel", "bias"} and not any(p.any() for p in params.values())


def test_torch_uniform_takes_a_dtype():
    drawn = torch_uniform(4)(jax.random.key(0), (1000,), jnp.bfloat16)
    assert drawn.dtype == jnp.bfloat16 and -0.5 <= drawn.min() < -0.45


@pytest.mark.usefixtures("untraced")
def test_parameters_of_one_shape_are_traced_once(monkeypatch):
    shapes, uniform = [], jax.random.uniform

    def counted(key, shape, *bounds, **options):
        shapes.append(shape)
        return uniform(key, shape, *bounds, **options)

    monkeypatch.setattr(jax.random, "uniform", counted)
    network = nn.Sequential([dense(3, 3), dense(3, 3)])
    x = jnp.ones((1, 3))
    params = network.init(jax.random.key(0), x)
    jax.eval_shape(network.apply, params, x)
    assert shapes == [(3, 3), (3,)]
    assert not np.array_equal(*(params["params"][f"layers_{i}"]["kernel"] for i in (0, 1)))


def test_stride_pads_both_sides():
    # A kernel that only sees its first row and column picks pixels -1, 1, 3 of each axis.
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    x = jnp.arange(36.0).reshape(1, 6, 6, 1)
    params = {"op": {"kernel": kernel, "bias": jnp.zeros(1)}}
    picked = Downsample(1).apply({"params": params}, x)[0, :, :, 0]
    np.testing.assert_array_equal(picked, [[0, 0, 0], [0, 7, 9], [0, 19, 21]])


def test_upsample_repeats_then_convolves():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    repeated = Upsample(1, use_conv=False).apply({}, x)
    wanted = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(repeated[0, :, :, 0], wanted)
    params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.ones(1)}}
    convolved = Upsample(1).apply({"params": params}, x)
    padded = np.pad(wanted, 1)
    sums = sum(padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3))
    np.testing.assert_array_equal(convolved[0, :, :, 0], sums + 1)


def test_average_pool_halves():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(average_pool(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


@pytest.mark.parametrize("dim", [6, 7, 320])
def test_timestep_embedding_is_cosines_then_sines(dim):
    t = np.array([0.0, 0.25, 999.0])
    half = dim // 2
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / half)
    wanted = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    ours = timestep_embedding(jnp.asarray(t), dim)
    assert ours.shape == (3, dim) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours[:, : 2 * half], wanted, atol=1e-4)
    assert not ours[:, 2 * half :].any()


def test_timestep_embedding_of_integers_and_another_period():
    t = jnp.array([3, 500])
    np.testing.assert_array_equal(timestep_embedding(t, 8), timestep_embedding(t * 1.0, 8))
    slowest = timestep_embedding(t, 8, max_period=100.0)[:, 7]
    np.testing.assert_allclose(slowest, np.sin(np.array([3, 500]) * 100.0**-0.75), atol=1e-5)
