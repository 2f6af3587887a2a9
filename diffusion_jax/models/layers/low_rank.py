"""Low-rank factors of dense layers and convolutions (LoRA, arXiv:2106.09685).

A layer may hold further parameters beside its kernel W, whose first axes are *k, i (inputs) and
whose last axis is o (outputs):
- down [*k i r] and up [r o]: the layer computes with W + down up, which is never built. So nothing
  as large as a kernel is kept for the backward pass, and no gradient has the size of a kernel.
- magnitude [o] (DoRA, arXiv:2402.09353): the norm of each column of W + down up becomes magnitude
  times the norm of that column of W. Gradients do not go through the norms (section 4.3).
- keep []: the share of the inputs of `down` that dropout keeps in training.
"""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DOWN, UP, MAGNITUDE, KEEP = FACTORS = ("down", "up", "magnitude", "keep")
_TINY = 1e-12


def has_factors(params: Any) -> bool:
    """Tell whether any layer of a tree of parameters has factors."""
    if not isinstance(params, Mapping):
        return False
    return "kernel" in params and DOWN in params or any(map(has_factors, params.values()))


def heeding(params: Any) -> AbstractContextManager[None]:
    """Make the context in which modules apply the factors that their parameters hold."""
    return nn.intercept_methods(_adapted) if has_factors(params) else contextlib.nullcontext()


def column_norms(kernel: Float[Array, "*k i o"]) -> Float[Array, "o"]:
    """Compute the norm of a kernel's weights for each output."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=range(kernel.ndim - 1)))


def merged_kernel(
    kernel: Float[Array, "*k i o"],
    down: Float[Array, "*k i r"],
    up: Float[Array, "r o"],
    magnitude: Float[Array, "o"] | None = None,
) -> Float[Array, "*k i o"]:
    """Compute the kernel that a layer with these factors computes with, float32."""
    kernel = jnp.asarray(kernel, jnp.float32)
    change = jnp.tensordot(jnp.asarray(down, jnp.float32), jnp.asarray(up, jnp.float32), 1)
    whole = kernel + change
    return whole if magnitude is None else whole * _gain(kernel, whole, magnitude, kernel.ndim)


def _gain(kernel: Array, whole: Array, magnitude: Array, ndim: int) -> Array:
    """Compute what multiplies each output, for arrays of so many axes."""
    norms = jnp.maximum(column_norms(whole), _TINY)  # a column of zeros stays one
    return _wide(magnitude * column_norms(kernel) / norms, ndim)


def _wide(vector: Array, ndim: int) -> Array:
    return jnp.reshape(vector, (1,) * (ndim - 1) + (-1,))


def _adapted(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Compute a method of a module; with factors, add what they give."""
    layer = context.module
    is_layer = isinstance(layer, nn.Dense | nn.Conv) and context.method_name == "__call__"
    if not (is_layer and layer.has_variable("params", DOWN)):
        return next_fun(*args, **kwargs)
    names = (*FACTORS, "kernel", "bias")
    held = {n: layer.get_variable("params", n) for n in names if layer.has_variable("params", n)}
    x, y = args[0], next_fun(*args, **kwargs)
    if KEEP in held and layer.has_rng("dropout"):
        kept = jax.random.bernoulli(layer.make_rng("dropout"), held[KEEP], x.shape)
        x = jnp.where(kept, x / held[KEEP].astype(x.dtype), 0)
    down, up = held[DOWN], held[UP]
    narrow = layer.clone(features=down.shape[-1], use_bias=False, parent=None, name=None)
    small: Any = narrow.apply({"params": {"kernel": down}}, x)
    added = jnp.tensordot(small, up.astype(small.dtype), 1)
    if MAGNITUDE not in held:
        return y + added
    kernel = jnp.asarray(held["kernel"], jnp.float32)
    whole = jax.lax.stop_gradient(merged_kernel(kernel, down, up))
    gain = _gain(kernel, whole, held[MAGNITUDE], y.ndim).astype(y.dtype)
    bias = _wide(held["bias"].astype(y.dtype), y.ndim) if "bias" in held else 0
    return (y - bias + added) * gain + bias
