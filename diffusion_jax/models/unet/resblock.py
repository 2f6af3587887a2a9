"""The residual blocks of the UNets: two convolutions, modulated by the timestep embedding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.basic import GroupNorm, average_pool, conv, dense, upsample_nearest
from diffusion_jax.models.layers.blending import AlphaBlender, blend
from diffusion_jax.models.layers.dtypes import Dtypes


class ResBlock(Dtypes, nn.Module):
    """Residual block: skip(x) + conv(dropout(silu(norm(conv(silu(norm(x))), emb)))).

    x [b h w c], emb [b e] -> [b h w out_channels], with doubled or halved sides for up or down. The
    embedding is added before the second norm, or with use_scale_shift_norm modulates it:
    norm(h) (1 + scale) + shift. The last convolution starts at 0. A dropout above 0 draws from the
    rng "dropout".
    With a kernel_size of three sides x is a video [b t h w c] and emb [b t e] has a row per frame.
    emb = None leaves the embedding out.
    Source: guided-diffusion, unet.ResBlock.
    """

    out_channels: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    up: bool = False
    down: bool = False
    kernel_size: tuple[int, ...] = (3, 3)
    num_groups: int = 32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *s c"], emb: Float[Array, "b *t e"] | None = None
    ) -> Float[Array, "b *s2 o"]:
        return _residual(self, x, emb, self.kernel_size)


class VideoResBlock(Dtypes, nn.Module):
    """Residual block of each frame, blended with one over time that follows it.

    x [(b t) h w c], emb [b t e], image_only_indicator [b t] -> [(b t) h w out_channels], where x
    has the frames of a clip in a row. The fields are as in ResBlock and AlphaBlender;
    video_kernel_size is (t, h, w), and time_stack the name of the block over time.
    Source: generative-models, video_model.VideoResBlock.
    """

    out_channels: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    up: bool = False
    down: bool = False
    video_kernel_size: tuple[int, ...] = (3, 3, 3)
    merge_strategy: str = "fixed"
    merge_factor: float = 0.5
    time_stack: str = "time_stack"
    num_groups: int = 32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "bt h w c"],
        emb: Float[Array, "b t e"],
        image_only_indicator: Num[Array, "b t"],
    ) -> Float[Array, "bt h2 w2 o"]:
        h = _residual(self, x, rearrange(emb, "b t e -> (b t) e"), (3, 3))
        frames = rearrange(h, "(b t) h w c -> b t h w c", t=emb.shape[1])
        moving = ResBlock(
            self.out_channels,
            dropout=self.dropout,
            kernel_size=self.video_kernel_size,
            num_groups=self.num_groups,
            name=self.time_stack,
            **self.dtypes,
        )(frames, emb)
        blender = AlphaBlender(
            self.merge_strategy,
            self.merge_factor,
            param_dtype=self.param_dtype,
            name="time_mixer",
        )
        h = blend(blender(image_only_indicator), frames, moving)
        return rearrange(h, "b t h w c -> (b t) h w c")


def _residual(
    block: ResBlock | VideoResBlock, x: Array, emb: Array | None, kernel_size: tuple[int, ...]
) -> Array:
    """Run the layers of a residual block, which become children of the calling module."""
    features = block.out_channels
    h = GroupNorm(block.num_groups, silu=True, name="in_layers_0", **block.dtypes)(x)
    if block.up:
        h, x = upsample_nearest(h), upsample_nearest(x)
    elif block.down:
        h, x = average_pool(h), average_pool(x)
    h = conv(x.shape[-1], features, kernel_size, name="in_layers_2", **block.dtypes)(h)

    norm = GroupNorm(block.num_groups, silu=True, name="out_layers_0", **block.dtypes)
    if emb is None:
        h = norm(h)
    else:
        width = 2 * features if block.use_scale_shift_norm else features
        shift: Any = dense(emb.shape[-1], width, name="emb_layers_1", **block.dtypes)(nn.silu(emb))
        if block.use_scale_shift_norm:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = norm(h, scale, shift)
        else:
            h = norm(h + jnp.expand_dims(shift, tuple(range(emb.ndim - 1, h.ndim - 1))))
    h = nn.Dropout(block.dropout, deterministic=False)(h)
    h = conv(features, features, kernel_size, zero=True, name="out_layers_3", **block.dtypes)(h)

    if x.shape[-1] != features:
        pointwise = (1,) * len(kernel_size)
        x = conv(x.shape[-1], features, pointwise, name="skip_connection", **block.dtypes)(x)
    return x + h
