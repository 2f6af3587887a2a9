"""The first stage of videos: an image encoder, and a decoder that sees the frames of a clip."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Num

from diffusion_jax.models.first_stage.autoencoder import (
    LAST_LAYER,
    Encoder,
    Fields,
    run_decoder,
)
from diffusion_jax.models.first_stage.blocks import (
    attend_pixels,
    block_makers,
    check_options,
    residual,
)
from diffusion_jax.models.layers.basic import (
    conv,
    identity_kernel,
    rematerialised,
    timestep_embedding,
)
from diffusion_jax.models.layers.blending import AlphaBlender, blend
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.models.layers.video_transformer import VideoTransformerBlock, embed_position
from diffusion_jax.models.unet.options import sides_of
from diffusion_jax.models.unet.resblock import ResBlock

MERGE_STRATEGIES = ("fixed", "learned")
# The last convolution of a decoder whose time_mode lets it see other frames.
TIME_LAYER = ("decoder", "time_mix_conv", "kernel")


class TimeMode(NamedTuple):
    """Which parts of a decoder see other frames: residual blocks, attention, last convolution."""

    residual: bool
    attention: bool
    last: bool


TIME_MODES = {
    "all": TimeMode(residual=True, attention=True, last=True),
    "conv-only": TimeMode(residual=True, attention=False, last=True),
    "attn-only": TimeMode(residual=False, attention=True, last=False),
}


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class VideoFields(Fields):
    """What a VideoDecoder is made from: Fields, and how frames see each other.

    time_mode: a row of TIME_MODES. video_kernel_size: sides (t, h, w) of the kernels over time, or
      one number for all three; released decoders have (3, 1, 1). alpha, merge_strategy: the share
      of the residual blocks over time and of the attention within a frame, "fixed" or "learned",
      when it is the sigmoid of a parameter that starts as alpha.
    """

    time_mode: str = "conv-only"
    video_kernel_size: int | Sequence[int] = 3
    alpha: float = 0.0
    merge_strategy: str = "learned"


class VideoResBlock(Dtypes, nn.Module):
    """Residual block of each frame, blended with one over time that follows it.

    x [(b t) h w c], image_only_indicator [b t] -> [(b t) h w out_channels], where x has the frames
    of a clip in a row. The blend is alpha temporal + (1 - alpha) spatial: the video UNet and
    VideoAttnBlock have alpha on the other side.
    Source: generative-models, temporal_ae.VideoResBlock.
    """

    out_channels: int
    dropout: float = 0.0
    video_kernel_size: tuple[int, ...] = (3, 3, 3)
    alpha: float = 0.0
    merge_strategy: str = "learned"
    num_groups: int = 32

    @nn.compact
    def __call__(
        self, x: Float[Array, "bt h w c"], image_only_indicator: Num[Array, "b t"]
    ) -> Float[Array, "bt h w o"]:
        h = residual(self, x)
        frames = rearrange(h, "(b t) h w c -> b t h w c", t=image_only_indicator.shape[1])
        moving = ResBlock(
            self.out_channels,
            dropout=self.dropout,
            kernel_size=self.video_kernel_size,
            num_groups=self.num_groups,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="time_stack",
        )(frames)
        share = jnp.where(image_only_indicator != 0, 0.0, _alpha(self, image_only_indicator))
        return rearrange(blend(share, moving, frames), "b t h w c -> (b t) h w c")


class VideoAttnBlock(Dtypes, nn.Module):
    """Self-attention over the pixels of each frame, blended with a transformer over time.

    x [(b t) h w c], image_only_indicator [b t] -> the same shape, where x has the frames of a clip
    in a row. The blend is alpha spatial + (1 - alpha) temporal.
    Source: generative-models, temporal_ae.VideoBlock.
    """

    alpha: float = 0.0
    merge_strategy: str = "learned"
    num_groups: int = 32
    attention_impl: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "bt h w c"], image_only_indicator: Num[Array, "b t"]
    ) -> Float[Array, "bt h w c"]:
        frames, channels = image_only_indicator.shape[1], x.shape[-1]

        def mix(h: Array) -> Array:
            sinusoids = timestep_embedding(jnp.arange(frames), channels)
            index = embed_position(self, sinusoids, channels, "video_time_embed")
            moving = rearrange(h, "(b t) h w c -> (b h w) t c", t=frames) + index[None]
            moving = VideoTransformerBlock(
                1,
                channels,
                attention_impl=self.attention_impl,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="time_mix_block",
            )(moving)
            _, height, width, _ = x.shape
            moving = rearrange(moving, "(b h w) t c -> (b t) h w c", h=height, w=width)
            share = jnp.where(image_only_indicator != 0, 1.0, _alpha(self, image_only_indicator))
            return blend(share.reshape(-1), h, moving)

        return attend_pixels(self, x, mix)


def _alpha(block: VideoResBlock | VideoAttnBlock, image_only_indicator: Array) -> Array:
    blender = AlphaBlender(
        block.merge_strategy, block.alpha, param_dtype=block.param_dtype, name="time_mixer"
    )
    return blender(image_only_indicator)


class VideoDecoder(VideoFields, nn.Module):
    """The decoder of Stable Video Diffusion: Decoder, whose blocks also see the other frames.

    With image_only_indicator 1, or for the blocks that time_mode leaves alone, it computes what
    Decoder computes with the same weights. A new one does so, too: its convolutions over time start
    as the identity, and of attention over time a fixed alpha of 1 keeps nothing.
    Raises ValueError, with the value and what would be right, when fields or inputs do not fit.
    Source: Blattmann et al. 2023, "Align your Latents", section 3.2; generative-models,
    temporal_ae.VideoDecoder.
    """

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "..."],
        *,
        image_only_indicator: Num[Array, "..."] | None = None,
        train: bool = False,
    ) -> Float[Array, "b t h2 w2 o"]:
        """Decode the latents of clips: z [b t h w z_channels] -> [b t fh fw out_ch].

        image_only_indicator: not 0 for frames that are independent images; None for none.
        """
        check_options(self)
        mode = _check_video_options(self)
        if z.ndim != 5:
            raise ValueError(f"z has shape {z.shape}, which should have the axes b t h w c")
        if image_only_indicator is None:
            image_only_indicator = jnp.zeros(z.shape[:2])
        if image_only_indicator.shape != z.shape[:2]:
            raise ValueError(
                f"image_only_indicator has shape {image_only_indicator.shape}, which should be "
                f"{z.shape[:2]}, the clips and frames of z"
            )
        res_block, attend = block_makers(self, train=train)
        common = {
            "alpha": self.alpha,
            "merge_strategy": self.merge_strategy,
            "num_groups": self.num_groups,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        kernel_size = sides_of(self.video_kernel_size)

        def video_res_block(h: Array, channels: int, name: str) -> Array:
            block = rematerialised(VideoResBlock, self.remat)
            options = {"video_kernel_size": kernel_size, "name": name, **common}
            dropout = self.dropout if train else 0.0
            return block(channels, dropout, **options)(h, image_only_indicator)

        def video_attend(h: Array, name: str) -> Array:
            if self.attn_type == "none":
                return h
            block = rematerialised(VideoAttnBlock, self.remat)
            options = {"attention_impl": self.attention_impl, "name": name, **common}
            return block(**options)(h, image_only_indicator)

        def last(h: Array) -> Array:
            dtypes = {"dtype": z.dtype, "param_dtype": self.param_dtype}
            frames = rearrange(h, "(b t) h w c -> b t h w c", t=z.shape[1])
            options = {"kernel_init": identity_kernel, "name": "time_mix_conv", **dtypes}
            mixed = conv(self.out_ch, self.out_ch, kernel_size, **options)
            alone = image_only_indicator[:, :, None, None, None] != 0
            h = jnp.where(alone, frames, mixed(frames))
            return rearrange(h, "b t h w c -> (b t) h w c")

        h = run_decoder(
            self,
            rearrange(z, "b t h w c -> (b t) h w c"),
            video_res_block if mode.residual else res_block,
            video_attend if mode.attention else attend,
            *([last] if mode.last else []),
        )
        return rearrange(h, "(b t) h w c -> b t h w c", t=z.shape[1])


class VideoAutoencoder(VideoFields, nn.Module):
    """Video <-> latents: the image Encoder for each frame, and a VideoDecoder.

    `encode` gives the moments of each frame, as Autoencoder does; images are encoded, too.

    use_quant_conv: a 1 x 1 convolution follows the encoder, as in the files of diffusers; released
      files of Stable Video Diffusion have it in the encoder's last layer. The decoder has none.
    See VideoFields for the others.
    Raises ValueError, with the value and what would be right, when fields or inputs do not fit.
    Source: Blattmann et al. 2023, "Stable Video Diffusion".
    """

    use_quant_conv: bool = False

    @property
    def embed_dim(self) -> int:
        """Channels of the latent."""
        return self.z_channels

    @property
    def last_layer(self) -> tuple[str, ...]:
        """Path of the weight whose gradients balance reconstruction and adversary."""
        return TIME_LAYER if _check_video_options(self).last else LAST_LAYER

    def setup(self) -> None:
        """Make encoder and decoder, and the convolution after the encoder."""
        fields = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(VideoFields)
        }
        image = {field.name: fields[field.name] for field in dataclasses.fields(Fields)}
        self.encoder, self.decoder = Encoder(**image), VideoDecoder(**fields)
        if self.use_quant_conv:
            width = (2 if self.double_z else 1) * self.z_channels
            options = {"dtype": None, "param_dtype": self.param_dtype}
            self.quant_conv = conv(width, width, (1, 1), **options)

    def encode(
        self, image: Float[Array, "*b h w c"], *, train: bool = False
    ) -> Float[Array, "*b h2 w2 m"]:
        """Encode images [b h w c] or clips [b t h w c] in [-1, 1] -> moments of every image."""
        h = self.encoder(image.reshape(-1, *image.shape[-3:]), train=train)
        h = self.quant_conv(h).astype(image.dtype) if self.use_quant_conv else h
        return h.reshape(*image.shape[:-3], *h.shape[1:])

    def decode(
        self,
        z: Float[Array, "b t h w d"],
        *,
        image_only_indicator: Num[Array, "b t"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b t h2 w2 o"]:
        """Decode latents, unscaled: [b t h w z_channels] -> clips [b t fh fw out_ch] in [-1, 1]."""
        return self.decoder(z, image_only_indicator=image_only_indicator, train=train)

    def __call__(
        self, video: Float[Array, "b t h w c"], *, train: bool = False
    ) -> Float[Array, "b t h2 w2 o"]:
        """Decode what was encoded, a Gaussian by its mean; `init` makes all parameters with it."""
        moments = self.encode(video, train=train)
        return self.decode(moments[..., : self.z_channels], train=train)


def _check_video_options(network: VideoFields) -> TimeMode:
    """Find the row of TIME_MODES; ValueError where fields do not fit."""
    if network.time_mode not in TIME_MODES:
        raise ValueError(
            f"time_mode = {network.time_mode!r} is unknown; choose from {', '.join(TIME_MODES)}"
        )
    if network.merge_strategy not in MERGE_STRATEGIES:
        raise ValueError(
            f"merge_strategy = {network.merge_strategy!r} is unknown; choose from "
            f"{', '.join(MERGE_STRATEGIES)}"
        )
    return TIME_MODES[network.time_mode]
