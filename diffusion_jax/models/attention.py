"""Attention: the one function that every network calls, and the block of the pixel UNets."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.models.layers import GroupNorm, conv

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b m n d"],
    v: Float[Array, "b m n d"],
    *,
    implementation: str = "auto",
) -> Float[Array, "b l n d"]:
    """Attend: softmax(q k^T / sqrt(d)) v per head n, softmax in float32.

    implementation: "cudnn" is the fused kernel (NVIDIA, half precision), "xla" runs anywhere,
    "auto" takes cudnn where it can. Raises ValueError for another name.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention_impl = {implementation!r} is unknown; "
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "auto":
        fused = jax.default_backend() == "gpu" and _fits_cudnn(q)
        implementation = "cudnn" if fused else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _fits_cudnn(q: Array) -> bool:
    head_dim = q.shape[-1]
    return q.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with a residual: x + proj_out(attention(qkv(norm(x)))).

    x [b h w c] -> [b h w c]. The channels of qkv are ordered (head, q k v, channel), as in every
    released model, or with new_order (q k v, head, channel). Raises ValueError when num_heads does
    not divide the channels.
    Source: guided-diffusion, unet.AttentionBlock.
    """

    num_heads: int = 1
    new_order: bool = False
    num_groups: int = 32
    attention_impl: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        _, height, _, channels = x.shape
        if self.num_heads < 1 or channels % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide the {channels} channels of "
                f"{'/'.join(self.path)}"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        tokens = rearrange(x, "b h w c -> b (h w) c")
        h = GroupNorm(self.num_groups, name="norm", **dtypes)(tokens)
        qkv = conv(channels, 3 * channels, (1,), name="qkv", **dtypes)(h)
        order = "b l (s n d) -> s b l n d" if self.new_order else "b l (n s d) -> s b l n d"
        q, k, v = rearrange(qkv, order, s=3, n=self.num_heads)
        h = attention(q, k, v, implementation=self.attention_impl)
        h = rearrange(h, "b l n d -> b l (n d)")
        h = conv(channels, channels, (1,), zero=True, name="proj_out", **dtypes)(h)
        return x + rearrange(h, "b (h w) c -> b h w c", h=height)
