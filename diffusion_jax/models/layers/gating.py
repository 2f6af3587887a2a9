"""The gate of GEGLU as one function that keeps nothing but its input for its backward pass.

Differentiated step by step, value * gelu(gate) keeps six arrays of this width instead of two: half
of what a transformer block keeps.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gated_gelu(h: Float[Array, "*b g"]) -> Float[Array, "*b f"]:
    """Gate a by the exact GELU of b, with [a, b] = h: a b Phi(b), computed in float32.

    The result has the dtype of h. No forward-mode derivative (jvp).
    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5.
    """
    value, gate = jnp.split(h, 2, axis=-1)
    gate = gate.astype(jnp.float32)
    return (value.astype(jnp.float32) * gate * _normal_cdf(gate)).astype(h.dtype)


def _forward(h: Array) -> tuple[Array, Array]:
    return gated_gelu(h), h


def _backward(h: Array, dy: Array) -> tuple[Array]:
    value, gate = (part.astype(jnp.float32) for part in jnp.split(h, 2, axis=-1))
    dy = dy.astype(jnp.float32)
    below = _normal_cdf(gate)
    density = jnp.exp(-0.5 * jnp.square(gate)) / math.sqrt(2.0 * math.pi)
    gradients = (dy * gate * below, dy * value * (below + gate * density))
    return (jnp.concatenate(gradients, axis=-1).astype(h.dtype),)


gated_gelu.defvjp(_forward, _backward)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * jax.scipy.special.erfc(-x / math.sqrt(2.0))
