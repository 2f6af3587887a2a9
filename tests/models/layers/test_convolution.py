"""Our convolution against lax's, forwards and backwards, with batches split and whole."""

import contextlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffusion_jax.devices.xla_flags import CONVOLUTIONS_BY_EIGEN
from diffusion_jax.models.layers import convolution
from diffusion_jax.models.layers.convolution import (
    MAX_PARTS,
    PART_SIZE,
    convolve,
    for_onednn,
    number_of_parts,
)


def layer(own, kernel_size=(3, 3), stride=1, padding=None):
    padding = padding or [(size // 2, size // 2) for size in kernel_size]
    conv = convolve if own else lax.conv_general_dilated
    return nn.Conv(6, kernel_size, strides=stride, padding=padding, conv_general_dilated=conv)


def results(module, params, x, cotangent):
    """Output and both gradients."""

    def loss(params, x):
        output = module.apply(params, x)
        return jnp.sum(output * cotangent), output

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)


def assert_same(ours, theirs):
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize(
    ("kernel_size", "stride", "shape"),
    [
        ((3, 3), 1, (4, 6, 5, 8)),
        ((3, 3), 1, (3, 6, 5, 8)),
        ((3, 3), 2, (4, 6, 4, 8)),
        ((1, 1), 1, (4, 6, 5, 8)),
        ((1,), 1, (4, 7, 8)),
        ((3,), 1, (4, 7, 8)),
        # Videos, against convolutions in three dimensions.
        ((3, 1, 1), 1, (2, 4, 3, 5, 8)),
        ((5, 3, 1), 1, (2, 4, 3, 5, 8)),
        ((3, 3, 3), 1, (2, 4, 3, 5, 8)),
        ((1, 1, 1), 1, (2, 4, 3, 5, 8)),
    ],
)
@pytest.mark.usefixtures("untraced")
def test_same_numbers_as_lax(monkeypatch, kernel_size, stride, shape):
    monkeypatch.setattr(convolution, "PART_SIZE", 100)
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer(True, kernel_size, stride).init(jax.random.key(1), x)
    output = layer(False, kernel_size, stride).apply(params, x)
    cotangent = jax.random.normal(jax.random.key(2), output.shape)
    ours, theirs = (
        results(layer(own, kernel_size, stride), params, x, cotangent) for own in (True, False)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("kernel_size", [(3, 1, 1), (3, 3, 3)])
def test_no_convolution_has_three_dimensions(kernel_size):
    x = jnp.ones((2, 4, 3, 5, 8))
    module = layer(True, kernel_size)
    params = module.init(jax.random.key(1), x)
    loss = jax.jit(jax.grad(lambda params, x: module.apply(params, x).sum(), argnums=(0, 1)))
    text = loss.lower(params, x).as_text()
    ranks = re.findall(r"stablehlo.convolution.*?-> tensor<((?:\d+x)+)f32>", text)
    assert ranks and {rank.count("x") for rank in ranks} == {4}


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "shape"),
    [
        ((4, 4), 2, ((1, 1), (1, 1)), (3, 8, 10, 4)),  # PatchGAN
        ((4, 4), 1, ((1, 1), (1, 1)), (3, 8, 7, 4)),
        ((3, 3), 2, ((0, 1), (0, 1)), (3, 8, 6, 4)),  # the autoencoder's Downsample
        ((11, 11), 4, ((2, 2), (2, 2)), (2, 35, 32, 3)),  # AlexNet
        ((3, 2), (2, 3), ((3, 0), (1, 2)), (2, 9, 11, 4)),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_strides_and_paddings(kernel_size, stride, padding, shape, deep):
    x = jax.random.normal(jax.random.key(0), shape)
    layers = [layer(own, kernel_size, stride, padding) for own in (True, False)]
    params = layers[0].init(jax.random.key(1), x)
    cotangent = jax.random.normal(jax.random.key(2), layers[1].apply(params, x).shape)
    with for_onednn() if deep else contextlib.nullcontext():
        ours = results(layers[0], params, x, cotangent)
    assert_same(ours, results(layers[1], params, x, cotangent))


def test_onednn_gets_gradients_of_kernels_in_three_dimensions():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    params = layer(True).init(jax.random.key(1), x)

    def lowered():
        gradient = jax.grad(lambda params, x: jnp.sum(layer(True).apply(params, x) ** 2))
        return jax.jit(gradient).lower(params, x).as_text()

    deep = "[b, 0, 1, 2, f]x[0, 1, 2, i, o]->[b, 0, 1, 2, f]"
    assert deep not in lowered()
    with for_onednn():
        assert deep in lowered()


def test_a_cpu_is_given_no_transposed_convolutions():
    # Its compiler runs them as naive loops in a branch or the body of a loop, as of jax 0.12.
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    module = layer(True, (4, 4), 2, ((1, 1), (1, 1)))
    params = module.init(jax.random.key(1), x)
    gradients = jax.grad(lambda params, x: jnp.sum(module.apply(params, x) ** 2), argnums=(0, 1))
    lowered = jax.jit(gradients).lower(params, x).as_text().splitlines()
    convolutions = [line for line in lowered if "stablehlo.convolution(" in line]
    assert len(convolutions) == 3
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in convolutions)


@pytest.mark.usefixtures("untraced")
def test_a_large_batch_is_split_and_runs_without_a_condition(monkeypatch):
    monkeypatch.setattr(convolution, "PART_SIZE", 500)
    x = jax.random.normal(jax.random.key(0), (8, 6, 5, 8))
    params = layer(True).init(jax.random.key(1), x)
    cotangent = jax.random.normal(jax.random.key(2), (8, 6, 5, 6))
    assert number_of_parts(cotangent.shape, cotangent.dtype) == 4
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(layer(True).apply(p, x) * cotangent)))
    program = gradient.lower(params, x).as_text()
    assert program.count("stablehlo.convolution") >= 4
    assert "stablehlo.case" not in gradient.lower(params, x).compile().as_text()
    assert "conditional" not in gradient.lower(params, x).compile().as_text()


@pytest.mark.parametrize(
    ("shape", "dtype", "parts"),
    [
        ((64, 28, 28, 32), jnp.float32, 8),
        ((64, 7, 7, 64), jnp.float32, 1),
        ((6, 256, 256, 32), jnp.float32, 2),
        ((1, 512, 512, 64), jnp.float32, 1),
        ((256, 256, 256, 64), jnp.float32, MAX_PARTS),
        ((64, 28, 28, 32), jnp.bfloat16, 1),
    ],
)
def test_parts_fit_the_cache(shape, dtype, parts):
    assert number_of_parts(shape, dtype) == parts
    assert PART_SIZE * 4 == 2**20


def test_eigen_gets_the_whole_batch(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", CONVOLUTIONS_BY_EIGEN)
    assert number_of_parts((64, 28, 28, 32), jnp.float32) == 1


@pytest.mark.usefixtures("untraced")
def test_split_gradients_of_a_sharded_batch(monkeypatch):
    monkeypatch.setattr(convolution, "PART_SIZE", 500)
    x = jax.random.normal(jax.random.key(0), (32, 6, 5, 8))
    params = layer(True).init(jax.random.key(1), x)
    cotangent = jax.random.normal(jax.random.key(2), (32, 6, 5, 6))
    alone = results(layer(False), params, x, cotangent)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    shared = results(layer(True), params, *jax.device_put((x, cotangent), batch))
    assert_same(shared, alone)
