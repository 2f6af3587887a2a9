"""The UNet of SV4D and SV4D 2: frames of several views at several times."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.basic import rematerialised
from diffusion_jax.models.layers.blending import check_strategy
from diffusion_jax.models.layers.view_transformer import VIEW_STACK, ViewTransformer
from diffusion_jax.models.unet.options import Fields, check_clips, check_options, sides_of
from diffusion_jax.models.unet.resblock import VideoResBlock
from diffusion_jax.models.unet.skeleton import Blocks, transformer_fields
from diffusion_jax.models.unet.video_unet import embed_frames, image_options, run_frames


class MultiviewUNet(Fields, nn.Module):
    """Denoising UNet of an object that moves, seen from several sides: x [b (t v) h w c].

    The result is [b (t v) h w out_channels], of x's dtype; all views of a time stand together. The
    fields carry the names of the released configs (of SpatialUNetModelWithTime). Most mean what
    they mean in VideoUNet; these are its own:

    time_block_merge_strategy, time_block_merge_factor, motion_block_merge_factor: see
        layers.blending.AlphaBlender; the last one is used with separate_motion_merge_factor.
    time_kernel_size: sides (t, h, w) of the kernels of the residual blocks over time, for which the
        t v frames are one long clip.
    motion_context_dim: channels of cond_view.
    use_camera_emb, use_3d_attention, separate_motion_merge_factor: see
        layers.view_transformer.ViewTransformer.

    As in the original no frame counts as an image. The original also takes cond_motion, and gives
    it to no layer.

    Raises ValueError, with the value and what would be right, when options or inputs do not fit.
    Source: Xie et al. 2024, "SV4D"; Yao et al. 2025, "SV4D 2.0"; generative-models,
    video_model.SpatialUNetModelWithTime with use_motion_attention.
    """

    transformer_depth_middle: int | None = None
    context_dim: int | None = None
    motion_context_dim: int | None = None
    disable_temporal_crossattention: bool = False
    time_block_merge_strategy: str = "fixed"
    time_block_merge_factor: float = 0.5
    motion_block_merge_factor: float = 0.5
    time_kernel_size: int | Sequence[int] = 3
    use_camera_emb: bool = False
    use_3d_attention: bool = False
    separate_motion_merge_factor: bool = False
    extra_ff_mix_layer: bool = False
    max_ddpm_temb_period: float = 10000.0
    legacy: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f h w c"],
        t: Num[Array, "b"],
        context: Float[Array, "b t ..."] | None = None,
        y: Num[Array, "b ..."] | None = None,
        *,
        cond_view: Float[Array, "b v h2 w2 m"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b f h w o"]:
        """Denoise the frames of t times and v views, f = t v.

        t [b]: one noise level for all. context [b t n d] or [b t d]: for each time. y: as in
        VideoUNet. cond_view: what is known of each view, such as its latent at the first time.
        """
        image = image_options(self)
        check_options(image)
        check_strategy(self.time_block_merge_strategy, "time_block_merge_strategy")
        check_clips(image, x, None if context is None else context[:, 0], y, None)
        emb = embed_frames(image, t, y, x.shape[1])
        context, cond_view, emb_of_views = self._by_view(emb, context, cond_view)
        dropout = self.dropout if train else 0.0
        video = jnp.zeros(x.shape[:2])  # no frame is an image

        def residual(h: Array, channels: int, name: str, **resampling: bool) -> Array:
            return rematerialised(VideoResBlock, self.remat)(
                channels,
                dropout=dropout,
                use_scale_shift_norm=self.use_scale_shift_norm,
                video_kernel_size=sides_of(self.time_kernel_size, "time_kernel_size"),
                merge_strategy=self.time_block_merge_strategy,
                merge_factor=self.time_block_merge_factor,
                time_stack=VIEW_STACK,
                num_groups=self.num_groups,
                name=name,
                **self.dtypes,
                **resampling,
            )(h, emb, video)

        def attend(h: Array, level: int | None, name: str, up: bool) -> Array:
            depth_middle = self.transformer_depth_middle
            fields = transformer_fields(image, h.shape[-1], level, dropout, up, depth_middle)
            return ViewTransformer(
                disable_temporal_crossattention=self.disable_temporal_crossattention,
                merge_strategy=self.time_block_merge_strategy,
                merge_factor=self.time_block_merge_factor,
                motion_merge_factor=self.motion_block_merge_factor,
                use_camera_emb=self.use_camera_emb,
                use_3d_attention=self.use_3d_attention,
                separate_motion_merge_factor=self.separate_motion_merge_factor,
                max_time_embed_period=self.max_ddpm_temb_period,
                name=name,
                **fields,
            )(h, emb_of_views, context, cond_view)

        return run_frames(image, x, Blocks(residual, attend))

    @nn.nowrap
    def _by_view(
        self, emb: Array, context: Array | None, cond_view: Array | None
    ) -> tuple[Array, Array, Array]:
        """Give context, cond_view and emb [b f e] the axes that blocks take."""
        if context is None or cond_view is None:
            name = "context" if context is None else "cond_view"
            raise ValueError(f"{name} is missing; a network of several views needs it")
        frames, times, views = emb.shape[1], context.shape[1], cond_view.shape[1]
        if frames != times * views:
            raise ValueError(
                f"x has {frames} frames, and context {times} times and cond_view {views} views; "
                f"x should have {times * views} frames"
            )
        if cond_view.shape[-1] != self.motion_context_dim:
            raise ValueError(
                f"cond_view has {cond_view.shape[-1]} channels; motion_context_dim should be the "
                f"same and is {self.motion_context_dim}"
            )
        context = context if context.ndim == 4 else context[:, :, None]
        return context, cond_view, rearrange(emb, "b (t v) e -> b t v e", v=views)
