"""The UNet of Stable Video Diffusion and SV3D: the image UNet, with a block over time in each."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.basic import rematerialised
from diffusion_jax.models.layers.blending import check_strategy
from diffusion_jax.models.layers.video_transformer import SpatialVideoTransformer
from diffusion_jax.models.unet.options import (
    Fields,
    check_clips,
    check_options,
    is_per_frame,
    sides_of,
)
from diffusion_jax.models.unet.resblock import VideoResBlock
from diffusion_jax.models.unet.skeleton import (
    Blocks,
    embed_classes,
    embed_timesteps,
    head,
    run_blocks,
    transformer_fields,
)
from diffusion_jax.models.unet.unet import UNet, pixels, stem


class VideoUNet(Fields, nn.Module):
    """Denoising UNet of videos: (x [b t h w c], t [b], context, y) -> [b t h w out_channels].

    The result has x's dtype. The fields carry the names of the released configs, and most mean what
    they mean in UNet, with which this network shares its blocks: for images, and with the same
    weights, both compute the same.

    patch_size: side of the squares of pixels of a frame that become channels inside.
    merge_strategy, merge_factor: how a frame alone and the frame in its clip are blended, see
        layers.blending.AlphaBlender.
    video_kernel_size: sides (t, h, w) of the kernels over time, or one number for all three.
    use_spatial_context: the blocks over time see the context of the first frame; otherwise they see
        time_context, of width time_context_dim, or nothing but the frames (None).
    disable_temporal_crossattention: the blocks over time see no context at all.
    transformer_depth_middle: blocks of the middle transformer; None for as many as the last level.
    max_ddpm_temb_period: longest period of the sinusoids that tell a block which frame it sees.
    extra_ff_mix_layer: has no effect, as in the original: the blocks over time always begin with a
        feed-forward.

    Raises ValueError, with the value and what would be right, when options or inputs do not fit.
    Source: Blattmann et al. 2023, "Stable Video Diffusion"; generative-models,
    video_model.VideoUNet.
    """

    patch_size: int = 1
    transformer_depth_middle: int | None = None
    context_dim: int | None = None
    time_context_dim: int | None = None
    use_spatial_context: bool = False
    disable_temporal_crossattention: bool = False
    merge_strategy: str = "fixed"
    merge_factor: float = 0.5
    video_kernel_size: int | Sequence[int] = 3
    extra_ff_mix_layer: bool = False
    max_ddpm_temb_period: float = 10000.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        t: Num[Array, "b"],
        context: Float[Array, "b ..."] | None = None,
        y: Num[Array, "b ..."] | None = None,
        *,
        image_only_indicator: Num[Array, "b ..."] | None = None,
        time_context: Float[Array, "b ..."] | None = None,
        train: bool = False,
    ) -> Float[Array, "b t h w o"]:
        """Denoise clips.

        t [b]: one noise level for a clip. context [b n d] for a clip, or [b t n d] for each frame.
        y [b ...] for a clip, or [b t ...] for each frame; the rest as in UNet.
        image_only_indicator: not 0 where frames are independent images; None for nowhere.
        time_context [b d] or [b n d]: see use_spatial_context.
        """
        image = image_options(self)
        check_options(image)
        check_strategy(self.merge_strategy)
        check_clips(image, x, context, y, image_only_indicator)
        if image_only_indicator is None:
            image_only_indicator = jnp.zeros(x.shape[:2])
        time_context = self._time_context(context, time_context)
        if context is not None and context.ndim == 4:
            context = rearrange(context, "b t n d -> (b t) n d")
        dropout = self.dropout if train else 0.0
        emb = embed_frames(image, t, y, x.shape[1])

        def residual(h: Array, channels: int, name: str, **resampling: bool) -> Array:
            return rematerialised(VideoResBlock, self.remat)(
                channels,
                dropout=dropout,
                use_scale_shift_norm=self.use_scale_shift_norm,
                video_kernel_size=sides_of(self.video_kernel_size),
                merge_strategy=self.merge_strategy,
                merge_factor=self.merge_factor,
                num_groups=self.num_groups,
                name=name,
                **self.dtypes,
                **resampling,
            )(h, emb, image_only_indicator)

        def attend(h: Array, level: int | None, name: str, up: bool) -> Array:
            depth_middle = self.transformer_depth_middle
            fields = transformer_fields(image, h.shape[-1], level, dropout, up, depth_middle)
            return SpatialVideoTransformer(
                disable_temporal_crossattention=self.disable_temporal_crossattention,
                merge_strategy=self.merge_strategy,
                merge_factor=self.merge_factor,
                max_time_embed_period=self.max_ddpm_temb_period,
                name=name,
                **fields,
            )(h, image_only_indicator, context, time_context)

        return run_frames(image, x, Blocks(residual, attend))

    @nn.nowrap
    def _time_context(self, context: Array | None, time_context: Array | None) -> Array | None:
        """Choose what the blocks over time see, [b n d] or None."""
        if self.use_spatial_context:
            if time_context is not None:
                raise ValueError("time_context is given and use_spatial_context = True")
            return context if context is None or context.ndim == 3 else context[:, 0]
        if (time_context is None) != (self.time_context_dim is None):
            given = "is missing" if time_context is None else "is given"
            raise ValueError(f"time_context {given} and time_context_dim = {self.time_context_dim}")
        if time_context is None:
            return None
        if time_context.shape[-1] != self.time_context_dim:
            raise ValueError(
                f"time_context has width {time_context.shape[-1]}; time_context_dim should be the "
                f"same and is {self.time_context_dim}"
            )
        return time_context if time_context.ndim == 3 else time_context[:, None]


def image_options(network: Any) -> UNet:
    """Make the image UNet with the same options, whose fields the shared parts read."""
    own = set(network.__dataclass_fields__) - {"parent", "name"}
    shared = {name: getattr(network, name) for name in UNet.__dataclass_fields__ if name in own}
    return UNet(**shared, use_spatial_transformer=True, parent=None)


def as_image_unet(network: Any) -> UNet | None:
    """Give a UNet of any kind as the image UNet with the same options; None for other networks."""
    if isinstance(network, UNet):
        return network
    return image_options(network) if isinstance(network, Fields) else None


def embed_frames(options: Any, t: Array, y: Array | None, frames: int) -> Float[Array, "b t e"]:
    """Embed the timestep of a clip, and what y says of the clip or of each frame."""
    emb = embed_timesteps(options, t)
    if y is not None and not is_per_frame(options, y):
        emb = emb + embed_classes(options, y)
    emb = repeat(emb, "b e -> b t e", t=frames)
    if y is not None and is_per_frame(options, y):
        each = embed_classes(options, rearrange(y, "b t ... -> (b t) ..."))
        emb = emb + rearrange(each, "(b t) e -> b t e", t=frames)
    return emb


def run_frames(options: Any, x: Array, blocks: Blocks) -> Array:
    """Run a UNet, whose blocks take the frames of a clip in a row, on x [b t h w c]."""
    h = stem(options, rearrange(x, "b t h w c -> (b t) h w c"))
    h = run_blocks(options, h, blocks)
    h = pixels(options, head(options, h.astype(x.dtype), x.dtype))
    return rearrange(h, "(b t) h w c -> b t h w c", t=x.shape[1])
