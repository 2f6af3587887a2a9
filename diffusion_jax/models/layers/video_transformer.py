"""The transformer of the video UNets: over the pixels of a frame, then over time at every pixel."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.basic import LayerNorm, dense, timestep_embedding
from diffusion_jax.models.layers.blending import AlphaBlender, blend
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.models.layers.transformer import (
    BLOCKS,
    BasicTransformerBlock,
    FeedForward,
    Fields,
    attend_and_feed,
    between_projections,
    is_scanned,
    make_block,
    scan_blocks,
)

TIME_STACK = "time_stack"


class VideoTransformerBlock(Dtypes, nn.Module):
    """Transformer block over time: feed-forward, then as BasicTransformerBlock.

    x [b l c] with a row for every pixel, context [r m d] as CrossAttention takes it or None (then
    all attention is to x) -> [b l c]. disable_cross_attention leaves the second attention out.
    Source: generative-models, video_attention.VideoTransformerBlock.
    """

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    disable_self_attn: bool = False
    disable_cross_attention: bool = False
    attention_impl: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l c"], context: Float[Array, "r m d"] | None = None
    ) -> Float[Array, "b l c"]:
        h = LayerNorm(name="norm_in", **self.dtypes)(x)
        x = FeedForward(self.dropout, name="ff_in", **self.dtypes)(h) + x
        return attend_and_feed(self, x, context, cross_attention=not self.disable_cross_attention)


class SpatialVideoTransformer(Fields, nn.Module):
    """Transformer whose every spatial block is blended with a block over time that follows it.

    x [(b t) h w c], image_only_indicator [b t] -> [(b t) h w c], where x has the frames of a clip
    in a row. context [r n d], with r = b or b t, is for the blocks over pixels and time_context
    [b m d] for the blocks over time; None makes that attention a self-attention. A block over time
    sees x plus an embedding of the frame's index. One AlphaBlender serves all blocks. The other
    fields are as in SpatialTransformer.
    Source: generative-models, video_attention.SpatialVideoTransformer.
    """

    disable_temporal_crossattention: bool = False
    merge_strategy: str = "fixed"
    merge_factor: float = 0.5
    max_time_embed_period: float = 10000.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "bt h w c"],
        image_only_indicator: Num[Array, "b t"],
        context: Float[Array, "r n d"] | None = None,
        time_context: Float[Array, "b m e"] | None = None,
    ) -> Float[Array, "bt h w c"]:
        frames = image_only_indicator.shape[1]
        index = embed_index(self, frames, x.shape[-1], "time_pos_embed")
        blender = AlphaBlender(
            self.merge_strategy,
            self.merge_factor,
            param_dtype=self.param_dtype,
            name="time_mixer",
        )
        alpha = blender(image_only_indicator.reshape(-1))

        def blocks(h: Array) -> Array:
            if not is_scanned(self):
                for i in range(self.depth):
                    h = self._pair(f"_{i}")(h, index, alpha, context, time_context)
                return h
            return scan_blocks(self._pair(""), self.depth, h, index, alpha, context, time_context)

        return between_projections(self, x, blocks)

    @nn.nowrap
    def _pair(self, number: str) -> nn.Module:
        disabled = self.disable_temporal_crossattention
        return _Pair(
            make_block(self, BasicTransformerBlock, f"{BLOCKS}{number}"),
            make_block(
                self,
                VideoTransformerBlock,
                f"{TIME_STACK}{number}",
                disable_cross_attention=disabled,
            ),
        )


class _Pair(nn.Module):
    """A spatial block and the block over time that follows it, both made by their parent."""

    spatial: nn.Module
    temporal: nn.Module

    def __call__(
        self,
        h: Float[Array, "bt s c"],
        index: Float[Array, "t c"],
        alpha: Float[Array, "..."],
        context: Array | None,
        time_context: Array | None,
    ) -> Float[Array, "bt s c"]:
        h = self.spatial(h, context)
        moving = rearrange(h, "(b t) s c -> b t s c", t=index.shape[0]) + index[None, :, None]
        moving = self.temporal(rearrange(moving, "b t s c -> (b s) t c"), time_context)
        moving = rearrange(moving, "(b s) t c -> (b t) s c", s=h.shape[1])
        return blend(alpha, h, moving)


def embed_index(options: Any, count: int, channels: int, name: str) -> Float[Array, "t c"]:
    """Embed the numbers 0, 1, ... of frames: sinusoids, and an MLP of the calling module."""
    sinusoids = timestep_embedding(
        jnp.arange(count), channels, max_period=options.max_time_embed_period
    )
    return embed_position(options, sinusoids, channels, name)


def embed_position(
    options: Any, h: Float[Array, "t e"], channels: int, name: str
) -> Float[Array, "t c"]:
    """Turn sinusoids, or another description of a position, into what is added to x [... c]."""
    h = h.astype(options.dtype)
    h = dense(h.shape[-1], 4 * channels, name=f"{name}_0", **options.dtypes)(h)
    return dense(4 * channels, channels, name=f"{name}_2", **options.dtypes)(nn.silu(h))
