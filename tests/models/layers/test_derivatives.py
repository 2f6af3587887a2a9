"""Both modes of differentiation through our layers, against what JAX finds for their formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.trees import drawn

from diffusion_jax.models.layers import basic, transformer
from diffusion_jax.models.layers.convolution import convolve
from diffusion_jax.models.layers.derivatives import with_derivatives
from diffusion_jax.models.layers.gating import gated_gelu
from diffusion_jax.models.layers.norm import group_norm, layer_norm
from diffusion_jax.models.unet import UNet


def plain_convolution(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), **_):
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


def plain_group_norm(x, gain, bias, *, num_groups, epsilon, silu=False, dtype=jnp.float32):
    grouped = x.reshape(x.shape[0], -1, num_groups, x.shape[-1] // num_groups)
    deviation = grouped - grouped.mean((1, 3), keepdims=True)
    variance = jnp.square(deviation).mean((1, 3), keepdims=True)
    axes = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
    normalised = (deviation / jnp.sqrt(variance + epsilon)).reshape(x.shape)
    h = normalised * gain.reshape(axes) + bias.reshape(axes)
    return (nn.silu(h) if silu else h).astype(dtype)


def plain_layer_norm(x, gain, bias, epsilon):
    deviation = x - x.mean(-1, keepdims=True)
    variance = jnp.square(deviation).mean(-1, keepdims=True)
    axes = (1,) * (x.ndim - 1) + (-1,)
    gain, bias = gain.reshape(axes), bias.reshape(axes)
    return deviation / jnp.sqrt(variance + epsilon) * gain + bias


def plain_gate(h):
    value, gate = jnp.split(h, 2, axis=-1)
    return value * jax.nn.gelu(gate, approximate=False)


NORM = {"num_groups": 2, "epsilon": 1e-5, "silu": True}
STRIDED = {"strides": (2, 2), "padding": ((0, 1), (1, 0))}
LAYERS = {
    # name: ours, the formula, shapes of the arguments
    "convolution": (
        lambda *a: convolve(*a, **STRIDED),
        lambda *a: plain_convolution(*a, **STRIDED),
        [(2, 4, 5, 3), (3, 3, 3, 4)],
    ),
    "group norm": (
        lambda *a: group_norm(*a, **NORM),
        lambda *a: plain_group_norm(*a, **NORM),
        [(2, 3, 4, 8), (2, 8), (2, 8)],
    ),
    "layer norm": (
        lambda *a: layer_norm(*a, 1e-5),
        lambda *a: plain_layer_norm(*a, 1e-5),
        [(2, 3, 8), (8,), (8,)],
    ),
    "gate": (gated_gelu, plain_gate, [(2, 3, 8)]),
}


def derivatives(function, arrays, tangents):
    """A jvp, the gradient of a function of it, and a Hessian-vector product."""
    forward = lambda arrays: jax.jvp(function, arrays, tangents)[1]
    loss = lambda arrays: jnp.sum(jnp.sin(function(*arrays)))
    return {
        "jvp": forward(arrays),
        "vjp of jvp": jax.grad(lambda arrays: jnp.sum(jnp.cos(forward(arrays))))(arrays),
        "jvp of vjp": jax.jvp(jax.grad(loss), (arrays,), (tangents,))[1],
    }


def batched(function, arrays, tangents):
    """Two jvps at once."""
    moved = lambda tangent: jax.jvp(function, arrays, (tangent, *tangents[1:]))[1]
    return jax.vmap(moved)(jnp.stack([tangents[0], -tangents[0]]))


def assert_same(ours, theirs, *, atol=1e-5):
    for (path, left), right in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        scale = np.abs(right).max()
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=atol * scale, err_msg=str(path))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_both_modes_in_any_order(name):
    ours, formula, shapes = LAYERS[name]
    keys = jax.random.split(jax.random.key(0), 2 * len(shapes))
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes * 2, strict=True)]
    arrays, tangents = tuple(drawn[: len(shapes)]), tuple(drawn[len(shapes) :])
    for derive in (derivatives, batched):
        found = [jax.jit(lambda f=f: derive(f, arrays, tangents))() for f in (ours, formula)]  # noqa: B023
        assert_same(*found)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_gpu_computes_is_the_same(monkeypatch, name):
    """Its branches of the rules, computed here."""

    def for_cuda(*arrays, default, cuda=None, **_):
        return (default if cuda is None else cuda)(*arrays)

    ours, formula, shapes = LAYERS[name]
    keys = jax.random.split(jax.random.key(1), len(shapes))
    arrays = [3.0 + jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]
    gradients = lambda f: jax.grad(lambda a: jnp.sum(jnp.sin(f(*a))))
    expected = jax.jit(gradients(formula))(arrays)
    monkeypatch.setattr(lax, "platform_dependent", for_cuda)
    assert_same(jax.jit(gradients(ours))(arrays), expected)


def test_only_a_gpu_is_given_barriers():
    ours, _, shapes = LAYERS["group norm"]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    traced = jax.jit(jax.grad(lambda *a: jnp.sum(ours(*a)))).trace(*arrays)
    texts = [traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu")]
    assert ["optimization_barrier" in text for text in texts] == [True, False]


def test_a_backward_pass_is_the_given_rule_and_a_forward_one_the_tangent():
    # Wrong on purpose, so that it shows which rule runs.
    double = with_derivatives(
        lambda x: (2.0 * x, ()), lambda _, dx: 3.0 * dx, lambda _, dy: (5.0 * dy,)
    )
    one = jnp.float32(1.0)
    twice = lambda x: lax.scan(lambda carry, _: (double(carry), None), x, length=2)[0]
    assert jax.jvp(double, (one,), (one,)) == (2.0, 3.0)
    assert jax.grad(double)(one) == 5.0
    assert jax.grad(jax.checkpoint(double))(one) == 5.0
    assert jax.grad(twice)(one) == 25.0


def test_layers_of_one_shape_are_traced_once():
    traced = []

    def rule(result, name):
        def run(*arrays):
            traced.append(name)
            return result(*arrays)

        return run

    square = with_derivatives(
        rule(lambda x: (x * x, (x,)), "forward"),
        rule(lambda saved, dx: 2.0 * saved[0] * dx, "tangent"),
        rule(lambda saved, dy: (2.0 * saved[0] * dy,), "gradients"),
    )
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(square(square(square(x))))))
    np.testing.assert_allclose(gradient(jnp.array([0.5, 2.0])), [8 * 0.5**7, 8 * 2.0**7])
    assert traced == ["forward", "gradients"]


def small_unet():
    """Apply a UNet with every layer of ours: ((params, x) -> output, drawn arguments)."""
    network = UNet(
        out_channels=2,
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_heads=2,
        num_groups=4,
        use_spatial_transformer=True,
        context_dim=4,
    )
    x = jnp.asarray(np.sin(np.arange(64.0)).reshape(2, 4, 4, 2), jnp.float32)
    context = jnp.asarray(np.cos(np.arange(24.0)).reshape(2, 3, 4), jnp.float32)
    t = jnp.array([3.0, 500.0])
    abstract = jax.eval_shape(network.init, jax.random.key(0), x, t, context)
    return lambda params, x: network.apply(params, x, t, context), (drawn(abstract), x)


@pytest.mark.slow
def test_a_unet_has_both_modes_in_any_order():
    apply, arguments = small_unet()
    found = jax.eval_shape(lambda *a: derivatives(apply, a, a), *arguments)
    assert found["jvp"].shape == arguments[1].shape
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(found["vjp of jvp"]) == shapes(found["jvp of vjp"]) == shapes(arguments)


@pytest.mark.slow
def test_derivatives_of_a_unet_are_those_of_its_formulas(monkeypatch):
    apply, arguments = small_unet()
    # Small, as the cosine of large derivatives would be mostly rounding.
    moved = jax.tree.map(lambda a: 0.01 * jnp.cos(a), arguments)

    def found():
        options = {"xla_backend_optimization_level": 0}
        run = jax.jit(lambda *a: derivatives(apply, a, moved), compiler_options=options)
        return run(*arguments)

    ours = found()
    monkeypatch.setattr(basic, "convolve", plain_convolution)
    monkeypatch.setattr(basic, "group_norm", plain_group_norm)
    monkeypatch.setattr(basic, "layer_norm", plain_layer_norm)
    monkeypatch.setattr(transformer, "gated_gelu", plain_gate)
    theirs = found()
    bounds = {
        "jvp": 1e-5,
        "jvp of vjp": 1e-5,
        "vjp of jvp": 1e-4,
    }  # the last adds up most roundings
    for name, bound in bounds.items():
        assert_same(ours[name], theirs[name], atol=bound)
