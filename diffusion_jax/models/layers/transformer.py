"""The spatial transformer of the latent UNets, and the two layouts of its parameters."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.models.layers.attention import attention
from diffusion_jax.models.layers.basic import GroupNorm, LayerNorm, conv, dense, rematerialised
from diffusion_jax.models.layers.gating import gated_gelu
from diffusion_jax.types import PyTree

BLOCKS = "transformer_blocks"


class CrossAttention(nn.Module):
    """Attention of x [b l c] to a context [b m d], or to x itself without one -> [b l c].

    to_q, to_k and to_v have no bias, to_out has one. Source: latent-diffusion, CrossAttention.
    """

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    attention_impl: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "b m d"] | None = None
    ) -> Float[Array, "b l c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        context = x if context is None else context
        inner = self.num_heads * self.head_dim
        q, k, v = (
            rearrange(
                dense(source.shape[-1], inner, use_bias=False, name=name, **dtypes)(source),
                "b l (n d) -> b l n d",
                n=self.num_heads,
            )
            for name, source in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        h = attention(q, k, v, implementation=self.attention_impl)
        h = rearrange(h, "b l n d -> b l (n d)")
        h = dense(inner, x.shape[-1], name="to_out_0", **dtypes)(h)
        return nn.Dropout(self.dropout, deterministic=False)(h)


class GEGLU(nn.Module):
    """Gated linear unit a gelu(b) with [a, b] = proj(x): [b l c] -> [b l features].

    The GELU is the exact one (erf), as in every released model.
    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5.
    """

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l f"]:
        projection = dense(
            x.shape[-1],
            2 * self.features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="proj",
        )
        return gated_gelu(projection(x))


class FeedForward(nn.Module):
    """Two-layer MLP with GEGLU of four times the width: [b l c] -> [b l c]."""

    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channels = x.shape[-1]
        h = GEGLU(4 * channels, name="net_0", **dtypes)(x)
        h = nn.Dropout(self.dropout, deterministic=False)(h)
        return dense(4 * channels, channels, name="net_2", **dtypes)(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context and a feed-forward, each pre-normed with a residual.

    x [b l c], context [b m d] or None (then all attention is to x) -> [b l c]. With
    disable_self_attn the first attention looks at the context too.
    Source: latent-diffusion, attention.BasicTransformerBlock.
    """

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    disable_self_attn: bool = False
    attention_impl: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "b m d"] | None = None
    ) -> Float[Array, "b l c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str) -> LayerNorm:
            return LayerNorm(name=name, **dtypes)

        def attend(name: str) -> CrossAttention:
            return CrossAttention(
                self.num_heads,
                self.head_dim,
                dropout=self.dropout,
                attention_impl=self.attention_impl,
                name=name,
                **dtypes,
            )

        x = attend("attn1")(norm("norm1")(x), context if self.disable_self_attn else None) + x
        x = attend("attn2")(norm("norm2")(x), context) + x
        return FeedForward(self.dropout, name="ff", **dtypes)(norm("norm3")(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer over the pixels with a residual: x + proj_out(blocks(proj_in(norm(x)), context)).

    x [b h w c] -> [b h w c]. context is None, one array [b m d] for all blocks, or one per block.
    use_linear makes proj_in and proj_out dense layers instead of 1 x 1 convolutions: same numbers,
    other parameter shapes. scan compiles one block instead of depth blocks and keeps their
    parameters stacked, see stack_blocks; the numbers are the same but for dropout's draws.
    Raises ValueError when the contexts are neither one nor depth.
    Source: latent-diffusion, attention.SpatialTransformer.
    """

    num_heads: int
    head_dim: int
    depth: int = 1
    dropout: float = 0.0
    disable_self_attn: bool = False
    use_linear: bool = False
    num_groups: int = 32
    attention_impl: str = "auto"
    remat: bool | str = False
    scan: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b m d"] | Sequence[Float[Array, "b _ _"]] | None = None,
    ) -> Float[Array, "b h w c"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        _, height, _, channels = x.shape
        inner = self.num_heads * self.head_dim
        h = GroupNorm(self.num_groups, epsilon=1e-6, name="norm", **dtypes)(x)
        if self.use_linear:
            h = rearrange(h, "b h w c -> b (h w) c")
            h = dense(channels, inner, name="proj_in", **dtypes)(h)
        else:
            h = conv(channels, inner, (1, 1), name="proj_in", **dtypes)(h)
            h = rearrange(h, "b h w c -> b (h w) c")
        h = self._blocks(h, self._contexts(context))
        if self.use_linear:
            h = dense(inner, channels, zero=True, name="proj_out", **dtypes)(h)
            h = rearrange(h, "b (h w) c -> b h w c", h=height)
        else:
            h = rearrange(h, "b (h w) c -> b h w c", h=height)
            h = conv(inner, channels, (1, 1), zero=True, name="proj_out", **dtypes)(h)
        return x + h

    def _contexts(self, context: Any) -> tuple[Any, ...]:
        contexts = tuple(context) if isinstance(context, Sequence) else (context,)
        if len(contexts) not in (1, self.depth):
            raise ValueError(
                f"{'/'.join(self.path)} got {len(contexts)} contexts; give 1 for all blocks or "
                f"{self.depth}, one per block"
            )
        return contexts

    @nn.nowrap
    def _blocks(self, h: Array, contexts: tuple[Any, ...]) -> Array:
        scanned = self.scan and self.depth > 1
        # Nothing is merged across the iterations of a scan: remat needs no barrier against it.
        block_class = rematerialised(BasicTransformerBlock, self.remat, prevent_cse=not scanned)

        def block(name: str) -> nn.Module:
            return block_class(
                self.num_heads,
                self.head_dim,
                dropout=self.dropout,
                disable_self_attn=self.disable_self_attn,
                attention_impl=self.attention_impl,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        if not scanned:
            for i in range(self.depth):
                h = block(f"{BLOCKS}_{i}")(h, contexts[min(i, len(contexts) - 1)])
            return h
        shared = len(contexts) == 1
        in_axes: Any = nn.broadcast if shared else 0
        scan = nn.scan(
            lambda module, carry, context: (module(carry, context), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=self.depth,
        )
        h, _ = scan(block(BLOCKS), h, contexts[0] if shared else jnp.stack(contexts))
        return h


def stack_blocks(params: PyTree) -> PyTree:
    """Stack transformer_blocks_0, _1, ... of every deep transformer into one transformer_blocks.

    The result is the layout of a network with scan = True; unstack_blocks is the inverse.
    """
    if not isinstance(params, dict):
        return params
    children = {name: stack_blocks(child) for name, child in params.items()}
    depth = sum(name.startswith(f"{BLOCKS}_") for name in children)
    if depth < 2:
        return children
    blocks = [children.pop(f"{BLOCKS}_{i}") for i in range(depth)]
    return children | {BLOCKS: jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: PyTree) -> PyTree:
    """Split every stacked transformer_blocks into _0, _1, ..., the names of released weights."""
    if not isinstance(params, dict):
        return params
    children = {name: unstack_blocks(child) for name, child in params.items()}
    if BLOCKS not in children:
        return children
    stacked = children.pop(BLOCKS)
    depth = jax.tree.leaves(stacked)[0].shape[0]
    blocks = {
        f"{BLOCKS}_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)
    }
    return children | blocks
