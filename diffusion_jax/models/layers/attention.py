"""Attention: the one function that every network calls, and the block of the pixel UNets."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.models.layers.basic import GroupNorm, conv
from diffusion_jax.models.layers.flash_attention import flash_attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "flash")
# With fewer keys, as those of a text, "flash" is "xla": the kernel would work mostly on padding.
MIN_FLASH_KEYS = 128
# From so many queries and keys on, "auto" takes the kernel: a head's logits then fill 4 MiB.
LONG = 1024


def attention(
    q: Float[Array, "b l n d"],
    k: Float[Array, "b m n d"],
    v: Float[Array, "b m n d"],
    *,
    implementation: str = "auto",
) -> Float[Array, "b l n d"]:
    """Attend: softmax(q k^T / sqrt(d)) v per head n, softmax in float32.

    implementation: "xla" runs anywhere; "cudnn" is the fused kernel of NVIDIA's GPUs, for half
    precision; "flash" that of TPUs, for at least MIN_FLASH_KEYS keys; "auto" chooses for the
    devices of the mesh in context (jax.set_mesh, sharding.on_mesh), which may be others than this
    host has, or without one for the default devices. Raises ValueError for another name.
    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention_impl = {implementation!r} is unknown; "
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "auto":
        implementation = _best(q, k)
    if implementation == "flash" and k.shape[1] >= MIN_FLASH_KEYS:
        return flash_attention(q, k, v)
    implementation = "cudnn" if implementation == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)


def _best(q: Array, k: Array) -> str:
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform == jax.default_backend() == "gpu" and _fits_cudnn(q):
        return "cudnn"  # which cannot be compiled for without being there
    # Outside of a mesh nothing tells how to part a kernel between devices.
    placed = not mesh.empty or jax.device_count() == 1
    long = min(q.shape[1], k.shape[1]) >= LONG
    return "flash" if platform == "tpu" and placed and long else "xla"


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
