"""GroupNorm with its modulation and SiLU, and LayerNorm, as functions with their own backward pass.

Differentiated step by step, the formula reads the activations more often than the backward passes
below, which keep nothing but their input. For GroupNorm that takes 0.6 of the time on a CPU.
Against flax.linen.GroupNorm and nn.silu: half the time forward, 0.7 forward and backward.
LayerNorm of flax.linen keeps three float32 arrays of the size of its input.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from diffusion_jax.models.layers.derivatives import Arrays, then, with_derivatives


def group_norm(
    x: Float[Array, "b *hw c"],
    gain: Float[Array, "b c"],
    bias: Float[Array, "b c"],
    *,
    num_groups: int,
    epsilon: float,
    silu: bool = False,
    dtype: Any = jnp.float32,
) -> Float[Array, "b *hw c"]:
    """Normalise over positions and channel groups: gain (x - mean) / sqrt(variance + eps) + bias.

    gain and bias are per sample, so that a modulation by the timestep costs nothing more. silu
    applies h sigmoid(h) to the result. Computed in float32 and returned in dtype; num_groups
    divides c.
    Source: Wu & He 2018, "Group Normalization", equations 1-6.
    """
    return _group_norm(num_groups, epsilon, silu, jnp.dtype(dtype))(x, gain, bias)


@cache
def _group_norm(num_groups: int, epsilon: float, silu: bool, dtype: Any) -> Callable[..., Array]:
    return with_derivatives(
        partial(_forward, num_groups=num_groups, epsilon=epsilon, silu=silu, dtype=dtype),
        partial(_tangent, num_groups=num_groups, silu=silu, dtype=dtype),
        partial(_gradients, num_groups=num_groups, silu=silu),
    )


def _forward(
    x: Array, gain: Array, bias: Array, *, num_groups: int, epsilon: float, silu: bool, dtype: Any
) -> tuple[Array, Arrays]:
    mean, inverse = _statistics(x.astype(jnp.float32), num_groups, epsilon)
    centred = x.astype(jnp.float32) - _spread(mean, x.ndim)
    h = centred * _spread(inverse * gain, x.ndim) + _spread(bias, x.ndim)
    h = jax.nn.silu(h) if silu else h
    return h.astype(dtype), (x, mean, inverse, gain, bias)


def _tangent(
    saved: Arrays, dx: Array, dgain: Array, dbias: Array, *, num_groups: int, silu: bool, dtype: Any
) -> Array:
    x, mean, inverse, gain, bias = saved
    positions = tuple(range(1, x.ndim - 1))
    centred = dx.astype(jnp.float32)
    centred = centred - _spread(_group_mean(jnp.mean(centred, positions), num_groups), x.ndim)
    normalised = (x.astype(jnp.float32) - _spread(mean, x.ndim)) * _spread(inverse, x.ndim)
    along = _group_mean(jnp.mean(centred * normalised, positions), num_groups)
    moved = (centred - normalised * _spread(along, x.ndim)) * _spread(inverse * gain, x.ndim)
    dh = moved + normalised * _spread(dgain, x.ndim) + _spread(dbias, x.ndim)
    if silu:
        h = normalised * _spread(gain, x.ndim) + _spread(bias, x.ndim)
        dh = dh * _silu_slope(h)
    return dh.astype(dtype)


def _gradients(
    saved: Arrays, dy: Array, *, num_groups: int, silu: bool
) -> tuple[Array, Array, Array]:
    x, mean, inverse, gain, bias = saved
    positions = tuple(range(1, x.ndim - 1))

    def gated(x: Array, dy: Array) -> tuple[Array, Array]:
        """Compute the normalised input, and the gradient of what SiLU is given."""
        normalised = (x.astype(jnp.float32) - _spread(mean, x.ndim)) * _spread(inverse, x.ndim)
        dy = dy.astype(jnp.float32)
        if silu:
            h = normalised * _spread(gain, x.ndim) + _spread(bias, x.ndim)
            dy = dy * _silu_slope(h)
        return normalised, dy

    normalised, dh = gated(x, dy)
    dbias = jnp.sum(dh, positions)
    dgain = jnp.sum(dh * normalised, positions)
    x, dy, dbias, dgain = then(x, dy, dbias, dgain)
    normalised, dh = gated(x, dy)
    # The mean and the variance move with x; what they take back is the same for a whole group.
    through_mean = inverse * _group_mean(dbias * gain, num_groups) / _count(x)
    through_variance = inverse * _group_mean(dgain * gain, num_groups) / _count(x)
    dx = dh * _spread(inverse * gain, x.ndim) - normalised * _spread(through_variance, x.ndim)
    return (dx - _spread(through_mean, x.ndim)).astype(x.dtype), dgain, dbias


def _silu_slope(h: Array) -> Array:
    gate = jax.nn.sigmoid(h)
    return gate * (1.0 + h * (1.0 - gate))


def layer_norm(
    x: Float[Array, "*b c"], gain: Float[Array, "c"], bias: Float[Array, "c"], epsilon: float
) -> Float[Array, "*b c"]:
    """Normalise over the last axis: gain (x - mean) / sqrt(variance + eps) + bias, in float32.

    Source: Ba et al. 2016, "Layer Normalization", equation 3.
    """
    return _layer_norm(epsilon)(x, gain, bias)


@cache
def _layer_norm(epsilon: float) -> Callable[..., Array]:
    forward = partial(_layer_forward, epsilon=epsilon)
    return with_derivatives(forward, _layer_tangent, _layer_gradients)


def _layer_forward(x: Array, gain: Array, bias: Array, *, epsilon: float) -> tuple[Array, Arrays]:
    centred = x.astype(jnp.float32)
    mean = jnp.mean(centred, -1, keepdims=True)
    centred = centred - mean
    inverse = lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + epsilon)
    gain, bias = (a.reshape(*(1,) * (x.ndim - 1), -1) for a in (gain, bias))
    return centred * inverse * gain + bias, (x, mean, inverse, gain)


def _layer_tangent(saved: Arrays, dx: Array, dgain: Array, dbias: Array) -> Array:
    x, mean, inverse, gain = saved
    centred = dx.astype(jnp.float32)
    centred = centred - jnp.mean(centred, -1, keepdims=True)
    normalised = (x.astype(jnp.float32) - mean) * inverse
    along = jnp.mean(centred * normalised, -1, keepdims=True)
    dgain, dbias = (a.reshape(gain.shape) for a in (dgain, dbias))
    return (centred - normalised * along) * inverse * gain + normalised * dgain + dbias


def _layer_gradients(saved: Arrays, dy: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, gain = saved
    normalised = (x.astype(jnp.float32) - mean) * inverse
    positions = tuple(range(x.ndim - 1))
    scaled = dy * gain
    # The mean and the variance move with x.
    through_mean = jnp.mean(scaled, -1, keepdims=True)
    through_variance = jnp.mean(scaled * normalised, -1, keepdims=True)
    dx = inverse * (scaled - through_mean - normalised * through_variance)
    return dx.astype(x.dtype), jnp.sum(dy * normalised, positions), jnp.sum(dy, positions)


def _statistics(x: Array, num_groups: int, epsilon: float) -> tuple[Array, Array]:
    """Mean and 1 / sqrt(variance + epsilon) of the group of each sample and channel, [b c].

    Sums run over one channel at a time, which vectorises.
    """
    positions = tuple(range(1, x.ndim - 1))

    def two_passes(x: Array) -> tuple[Array, Array]:
        mean = jnp.mean(x, positions)
        return mean, jnp.mean(jnp.square(x - _spread(mean, x.ndim)), positions)

    def one_pass(x: Array) -> tuple[Array, Array]:
        first = x[(slice(None), *(0 for _ in positions))]
        moved = x - _spread(first, x.ndim)
        mean, square = jnp.mean(moved, positions), jnp.mean(jnp.square(moved), positions)
        return first + mean, jnp.maximum(square - jnp.square(mean), 0.0)

    # Deviations are taken from the channel's mean, or on a GPU, where a pass over x costs most,
    # from its first number: E[x^2] - E[x]^2 loses every digit where the mean is far above the
    # deviation.
    channel_mean, channel_variance = lax.platform_dependent(x, cuda=one_pass, default=two_passes)
    mean = _group_mean(channel_mean, num_groups)
    variance = _group_mean(channel_variance + jnp.square(channel_mean - mean), num_groups)
    return mean, lax.rsqrt(variance + epsilon)


def _group_mean(per_channel: Array, num_groups: int) -> Array:
    """Replace each of [b c] by the mean over its group."""
    batch, channels = per_channel.shape
    grouped = per_channel.reshape(batch, num_groups, channels // num_groups)
    mean = jnp.mean(grouped, -1, keepdims=True)
    return jnp.broadcast_to(mean, grouped.shape).reshape(batch, channels)


def _count(x: Array) -> int:
    """Positions per channel."""
    return x.size // (x.shape[0] * x.shape[-1])


def _spread(per_channel: Array, ndim: int) -> Array:
    """Give [b c] the axes [b 1 ... 1 c] of an activation."""
    batch, channels = per_channel.shape
    return per_channel.reshape(batch, *(1,) * (ndim - 2), channels)
