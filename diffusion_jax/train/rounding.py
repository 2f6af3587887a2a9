"""Numbers kept in fewer bits without a bias: each is rounded up or down at random.

An average that moves by less than half a step of its format never moves when it is rounded to the
nearest number. Rounded at random it moves as it should in the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from diffusion_jax.types import PyTree

DTYPES = ("float32", "bfloat16")


def check_dtype(name: str, dtype: Any) -> None:
    """Raise ValueError for an optimizer option whose dtype is not in DTYPES."""
    found = jnp.dtype(dtype).name
    if found not in DTYPES:
        raise ValueError(
            f"optimizer.{name} = {found!r} is unknown; choose from {', '.join(DTYPES)}"
        )


def round_at_random(tree: PyTree, dtype: Any, step: Int[Array, ""]) -> PyTree:
    """Round float32 leaves to bfloat16, up with the probability that keeps the mean.

    dtype: a name of DTYPES; float32 leaves the tree as it is. step: what the draws depend on,
    together with the place of a leaf in the tree and of a number in its leaf. They depend on
    neither the mesh nor a seed. NaN and infinities stay what they are.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [_round(x, step, i) for i, x in enumerate(leaves)])


def _round(x: Array, step: Array, place: int) -> Array:
    """Add noise below the last bit of bfloat16, the upper half of a float32, and cut it off."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    upper = (bits + (_noise(x.shape, step, place) >> 16)) & jnp.uint32(0xFFFF0000)
    rounded = lax.bitcast_convert_type(upper, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _noise(shape: tuple[int, ...], step: Array, place: int) -> Array:
    """Hash the index of every number: uint32, a dozen operations each, made where it is used.

    jax.random takes ten times as many. The salt enters first: XLA would compute what leaves of one
    shape share for all of them together, and keep all of their results at once.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    salt = _mixed(_mixed(step.astype(jnp.uint32)) + jnp.uint32(place))
    return _mixed(index ^ salt)


def _mixed(x: Array) -> Array:
    """Spread every bit over all of them: the finaliser of MurmurHash3 (Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
