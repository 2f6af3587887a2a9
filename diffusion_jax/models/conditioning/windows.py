"""Texts longer than a text encoder reads, in windows; and weights of their tokens.

The tokens of a text are int32 [b l], or [b w l] in w windows, each with a start token first and an
end token, or float32 [b w l 2], tokens and their weights.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Shaped

# Axes of the tokens of texts in windows, and with weights besides.
IN_WINDOWS, WEIGHTED = 3, 4


def token_shape(max_length: int, windows: int = 1, *, weighted: bool = False) -> tuple[int, ...]:
    """Tell the shape of the tokens of one text in so many windows."""
    if windows == 1 and not weighted:
        return (max_length,)
    return (windows, max_length, 2) if weighted else (windows, max_length)


def encode_windows(encode: Callable[[Array], Any], tokens: Shaped[Array, "b *axes"]) -> Any:
    """Encode texts by what encodes tokens int32 [b l], window by window.

    The states of the tokens [b l d] are joined along the tokens, [b w * l d], and multiplied by the
    weights, see `weigh`. Of any other output, such as a pooled vector, the first window's is kept.
    """
    if tokens.ndim < IN_WINDOWS:
        return encode(tokens)
    weights = None
    if tokens.ndim == WEIGHTED:
        tokens, weights = tokens[..., 0].astype(jnp.int32), tokens[..., 1]
    count, length = tokens.shape[1:]
    found = encode(rearrange(tokens, "b w l -> (b w) l"))

    def join(output: Array) -> Array:
        windows = rearrange(output, "(b w) ... -> b w ...", w=count)
        if output.ndim != 3 or output.shape[1] != length:
            return windows[:, 0]
        windows = windows if weights is None else weigh(windows, weights)
        return rearrange(windows, "b w l d -> b (w l) d")

    return tuple(map(join, found)) if isinstance(found, tuple) else join(found)


def weigh(
    states: Float[Array, "b w l d"], weights: Float[Array, "b w l"]
) -> Float[Array, "b w l d"]:
    """Multiply the states of tokens by their weights, and bring each window's mean back.

    The mean is over the tokens and the features of a window, float32; a window without a weight
    other than 1 stays as it is.
    Source: AUTOMATIC1111's web interface, which takes the mean over all images of a call.
    """
    exact = states.astype(jnp.float32)
    changed = exact * weights[..., None]
    before, after = (jnp.mean(x, (-2, -1), keepdims=True) for x in (exact, changed))
    gain = jnp.where(after == 0.0, 1.0, before / jnp.where(after == 0.0, 1.0, after))
    plain = jnp.all(weights == 1.0, -1)[..., None, None]
    return jnp.where(plain, states, (changed * gain).astype(states.dtype))


def first_window(tokens: Shaped[Array, "b *axes"]) -> Shaped[Array, "b l"]:
    """Take the tokens [b l] of the first window, without weights."""
    if tokens.ndim < IN_WINDOWS:
        return tokens
    return (tokens if tokens.ndim == IN_WINDOWS else tokens[..., 0].astype(jnp.int32))[:, 0]


def null_tokens(null: Any, like: Shaped[Array, "b *axes"]) -> Shaped[Array, "..."]:
    """Repeat the tokens [l] of a text in each window of others, with weights of 1 if they have any.

    What has weights already, or windows, is given back as it is.
    """
    own = jnp.asarray(null, like.dtype)
    if like.ndim == WEIGHTED and own.ndim == 1:
        own = jnp.stack([own, jnp.ones_like(own)], -1)
    return own
