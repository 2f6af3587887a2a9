"""The gate of GEGLU against its formula, with the derivative that JAX finds for it."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.models.layers.gating import gated_gelu


def formula(h):
    value, gate = jnp.split(h, 2, axis=-1)
    return value * jax.nn.gelu(gate, approximate=False)


def test_values_and_gradients_are_those_of_the_formula():
    h = 3.0 * jax.random.normal(jax.random.key(0), (2, 5, 16))
    cotangent = jax.random.normal(jax.random.key(1), (2, 5, 8))
    np.testing.assert_allclose(gated_gelu(h), formula(h), rtol=1e-5, atol=1e-6)
    ours, theirs = (
        jax.grad(lambda h, f=f: jnp.sum(f(h) * cotangent))(h) for f in (gated_gelu, formula)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_far_gates_are_closed_or_open():
    h = jnp.array([[2.0, 2.0, -40.0, 40.0]])
    np.testing.assert_array_equal(gated_gelu(h), [[0.0, 80.0]])
    gradient = jax.grad(lambda h: gated_gelu(h).sum())(h)
    np.testing.assert_array_equal(gradient, [[0.0, 40.0, 0.0, 2.0]])


def test_it_keeps_its_input_alone_in_its_dtype():
    h = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)
    y, kept = jax.eval_shape(lambda h: jax.vjp(gated_gelu, h), h)
    assert (y.shape, y.dtype) == ((4, 32), jnp.bfloat16)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)] == [((4, 64), jnp.bfloat16)]
