"""The transformer of SV4D: over the pixels of a frame, then over views, then over time."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float

from diffusion_jax.models.layers.blending import AlphaBlender, blend
from diffusion_jax.models.layers.transformer import (
    BLOCKS,
    BasicTransformerBlock,
    Fields,
    between_projections,
    is_scanned,
    make_block,
    scan_blocks,
)
from diffusion_jax.models.layers.video_transformer import (
    VideoTransformerBlock,
    embed_index,
    embed_position,
)

VIEW_STACK = "time_mix_blocks"
MOTION_STACK = "motion_blocks"


class ViewTransformer(Fields, nn.Module):
    """Transformer whose spatial blocks are each followed by a block over views and one over time.

    x [(b t v) h w c] -> the same shape, where x has the frames of a clip in a row, all views of a
    time together. emb [b t v e] describes the noise level and the camera, context [b t n d] the
    times, and reference [b v h' w' m] is what is known of each view: resized to h x w, each of its
    pixels is the context of the block over time there. Results of the blocks over views and over
    time are blended with what they were given, by alpha of an AlphaBlender.

    use_camera_emb: a block over views learns which one it sees from the emb of the first time,
        otherwise from the view's number.
    use_3d_attention: the block over views takes v neighbours on the axis (b v h w) of each time for
        the views of a pixel, and the context of another row: what the original does (its weights
        were trained so).
    separate_motion_merge_factor: the block over time has an AlphaBlender of its own.

    The other fields are as in SpatialVideoTransformer.
    Source: generative-models, PostHocSpatialTransformerWithTimeMixingAndMotion.
    """

    disable_temporal_crossattention: bool = False
    merge_strategy: str = "fixed"
    merge_factor: float = 0.5
    motion_merge_factor: float = 0.5
    use_camera_emb: bool = False
    use_3d_attention: bool = False
    separate_motion_merge_factor: bool = False
    max_time_embed_period: float = 10000.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "btv h w c"],
        emb: Float[Array, "b t v e"],
        context: Float[Array, "b t n d"],
        reference: Float[Array, "b v h2 w2 m"],
    ) -> Float[Array, "btv h w c"]:
        times, views, channels = *emb.shape[1:3], x.shape[-1]
        view_alpha = self._alpha("time_mixer", self.merge_factor)
        if self.separate_motion_merge_factor:
            motion_alpha = self._alpha("time_mixer_motion", self.motion_merge_factor)
        else:
            motion_alpha = view_alpha
        if self.use_camera_emb:
            camera = rearrange(emb[:, 0], "b v e -> (b v) e")
            view = embed_position(self, camera, channels, "time_mix_time_embed")
            view = rearrange(view, "(b v) c -> b v c", v=views)
        else:
            view = embed_index(self, views, channels, "time_mix_time_embed")
            view = repeat(view, "v c -> b v c", b=emb.shape[0])
        index = embed_index(self, times, channels, "time_mix_motion_embed")
        size = (*reference.shape[:2], *x.shape[1:3], reference.shape[-1])
        reference = jax.image.resize(reference, size, "linear", antialias=False)
        inputs = (
            rearrange(context, "b t n d -> (b t) n d"),
            rearrange(reference, "b v h w m -> (b v h w) 1 m").astype(self.dtype),
            view,
            index,
            view_alpha,
            motion_alpha,
        )

        def blocks(h: Array) -> Array:
            if not is_scanned(self):
                for i in range(self.depth):
                    h = self._triple(f"_{i}")(h, *inputs)
                return h
            return scan_blocks(self._triple(""), self.depth, h, *inputs)

        return between_projections(self, x, blocks)

    @nn.nowrap
    def _alpha(self, name: str, merge_factor: float) -> Array:
        blender = AlphaBlender(
            self.merge_strategy, merge_factor, param_dtype=self.param_dtype, name=name
        )
        return blender(jnp.zeros(1))  # no frame is an image

    @nn.nowrap
    def _triple(self, number: str) -> nn.Module:
        fields = {"disable_cross_attention": self.disable_temporal_crossattention}
        return _Triple(
            make_block(self, BasicTransformerBlock, f"{BLOCKS}{number}"),
            make_block(self, VideoTransformerBlock, f"{VIEW_STACK}{number}", **fields),
            make_block(self, VideoTransformerBlock, f"{MOTION_STACK}{number}", **fields),
            self.use_3d_attention,
        )


class _Triple(nn.Module):
    """A spatial block, the block over views and the one over time, all made by their parent."""

    spatial: nn.Module
    over_views: nn.Module
    over_time: nn.Module
    use_3d_attention: bool

    def __call__(
        self,
        h: Float[Array, "btv s c"],
        context: Float[Array, "bt n d"],
        reference: Float[Array, "bvs 1 m"],
        view: Float[Array, "b v c"],
        index: Float[Array, "t c"],
        view_alpha: Float[Array, "1"],
        motion_alpha: Float[Array, "1"],
    ) -> Float[Array, "btv s c"]:
        sizes = {"t": index.shape[0], "v": view.shape[1], "s": h.shape[1]}
        h = self.spatial(h, context)

        h = rearrange(h, "(b t v) s c -> b v s t c", **sizes)
        mixed = h + view[:, :, None, None]
        # The axes that a row of the block has, and what stands in the place of the views.
        rows = "(b t s) v c"
        if self.use_3d_attention:
            mixed = rearrange(mixed, "b v s t c -> (b v s) t c")
            mixed = rearrange(mixed, "(g v) t c -> (g t) v c", v=sizes["v"])
            mixed = self.over_views(mixed, context)
            mixed = rearrange(mixed, "(g t) v c -> (g v) t c", t=sizes["t"])
            mixed = rearrange(mixed, "(b v s) t c -> b v s t c", v=sizes["v"], s=sizes["s"])
        else:
            mixed = self.over_views(rearrange(mixed, f"b v s t c -> {rows}"), context)
            mixed = rearrange(mixed, f"{rows} -> b v s t c", t=sizes["t"], s=sizes["s"])
        h = blend(view_alpha, h, mixed)

        mixed = rearrange(h + index[None, None, None], "b v s t c -> (b v s) t c")
        mixed = self.over_time(mixed, reference)
        mixed = rearrange(mixed, "(b v s) t c -> b v s t c", v=sizes["v"], s=sizes["s"])
        h = blend(motion_alpha, h, mixed)
        return rearrange(h, "b v s t c -> (b t v) s c")
