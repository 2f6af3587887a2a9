"""Layers with factors against the same layers with kernels that NumPy has merged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers.basic import conv, dense
from diffusion_jax.models.layers.low_rank import has_factors, heeding, merged_kernel

LAYERS = {
    "dense": (dense(7, 5), (3, 7)),
    "dense without bias": (dense(7, 5, use_bias=False), (3, 7)),
    "convolution": (conv(7, 5), (2, 4, 6, 7)),
    "with a stride": (conv(7, 5, stride=2), (2, 4, 6, 7)),
    "1 x 1": (conv(7, 5, (1, 1)), (2, 4, 6, 7)),
    "over time": (conv(7, 5, (3, 1, 1)), (2, 4, 2, 2, 7)),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def drawn(layer, shape):
    """Numbers for a layer: its own parameters, and the factors of rank 2."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(shape))["params"]
    params = {name: normal(i, *leaf.shape) for i, (name, leaf) in enumerate(shapes.items())}
    kernel = params["kernel"].shape
    return params, {"down": normal(3, *kernel[:-1], 2), "up": normal(4, 2, kernel[-1])}


def apply(layer, params, x, **options):
    with heeding(params):
        return layer.apply({"params": params}, x, **options)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_factors_computes_with_the_merged_kernel(name, dora):
    layer, shape = LAYERS[name]
    params, factors = drawn(layer, shape)
    kernel, x = params["kernel"], normal(5, *shape)
    change = np.einsum("...ir,ro->...io", *map(np.asarray, factors.values()))
    merged = np.asarray(kernel) + change
    if dora:
        factors["magnitude"] = jnp.abs(normal(6, 5))
        axes = tuple(range(kernel.ndim - 1))
        norms = np.sqrt((kernel**2).sum(axes)), np.sqrt((merged**2).sum(axes))
        merged = merged * np.asarray(factors["magnitude"] * norms[0] / norms[1])
    found = apply(layer, params | factors, x)
    expected = apply(layer, params | {"kernel": merged}, x)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(merged_kernel(kernel, **factors), merged, rtol=2e-5, atol=2e-5)


def test_gradients_are_right_and_nothing_of_them_is_as_large_as_a_kernel():
    layer, shape = LAYERS["dense"]
    params, factors = drawn(layer, shape)
    x, dy = normal(5, *shape), normal(6, 3, 5)

    def loss(factors):
        return jnp.sum(apply(layer, params | factors, x) * dy)

    found = jax.grad(loss)(factors)
    outer = np.einsum("bi,bo->io", x, dy)  # the gradient of the whole kernel
    np.testing.assert_allclose(found["down"], outer @ factors["up"].T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["up"], factors["down"].T @ outer, rtol=1e-4, atol=1e-4)
    program = jax.make_jaxpr(jax.grad(loss))(factors)
    made = [var.aval.shape for eqn in program.eqns for var in eqn.outvars]
    assert made and (7, 5) not in made and (5, 7) not in made


def test_the_magnitude_alone_learns_of_norms():
    """DoRA, section 4.3: the gradient goes around the norm of the merged kernel."""
    layer, shape = LAYERS["dense"]
    params, factors = drawn(layer, shape)
    x, dy = normal(5, *shape), normal(6, 3, 5)

    def loss(factors):
        return jnp.sum(apply(layer, params | factors, x) * dy)

    found = jax.grad(loss)({**factors, "magnitude": jnp.ones(5)})
    whole = params["kernel"] + factors["down"] @ factors["up"]
    gain = np.linalg.norm(params["kernel"], axis=0) / np.linalg.norm(whole, axis=0)
    outer = np.einsum("bi,bo->io", x, dy) * np.asarray(gain)
    np.testing.assert_allclose(found["up"], factors["down"].T @ outer, rtol=1e-3, atol=1e-3)
    slope = np.asarray(dy * (x @ whole)).sum(0) * np.asarray(gain)
    np.testing.assert_allclose(found["magnitude"], slope, rtol=1e-3, atol=1e-3)


def test_a_column_of_zeros_stays_one_and_is_no_nan():
    layer, shape = LAYERS["dense without bias"]
    kernel = jnp.zeros((7, 5))
    factors = {"down": normal(0, 7, 2), "up": jnp.zeros((2, 5)), "magnitude": jnp.ones(5)}
    found = apply(layer, {"kernel": kernel} | factors, normal(1, *shape))
    np.testing.assert_array_equal(found, jnp.zeros((3, 5)))


def test_dropout_takes_inputs_of_the_factors_alone_and_in_training_alone():
    layer, shape = dense(400, 1, use_bias=False), (1, 400)
    kernel = np.ones((400, 1), np.float32)
    half = {"down": kernel, "up": np.ones((1, 1), np.float32), "keep": np.float32(0.5)}
    x = np.ones(shape, np.float32)
    assert float(apply(layer, {"kernel": kernel} | half, x)[0, 0]) == 800.0
    found = float(
        apply(layer, {"kernel": kernel} | half, x, rngs={"dropout": jax.random.key(0)})[0, 0]
    )
    assert found != 800.0 and abs(found - 800.0) < 120.0  # six standard deviations


def test_only_a_tree_with_factors_is_treated_so():
    layer, shape = LAYERS["dense"]
    params, factors = drawn(layer, shape)
    assert has_factors({"a": {"b": params | factors}}) and not has_factors({"a": {"b": params}})
    assert not has_factors({"down": {"kernel": np.zeros((2, 2))}})  # a module of this name
    assert type(heeding(params)).__name__ == "nullcontext"


def test_other_modules_are_left_alone():
    params = {"kernel": normal(0, 3, 7, 5), "down": normal(1, 1)}
    module = nn.ConvTranspose(5, (3,), use_bias=False)
    x = normal(2, 1, 4, 7)
    np.testing.assert_array_equal(
        apply(module, params, x), module.apply({"params": {"kernel": params["kernel"]}}, x)
    )
