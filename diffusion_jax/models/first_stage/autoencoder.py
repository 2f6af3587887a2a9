"""The first stage of latent diffusion: encoder, decoder, and both as one autoencoder."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.models.first_stage.blocks import EPSILON, HalveSides, block_makers, check_options
from diffusion_jax.models.layers.basic import GroupNorm, Upsample, conv
from diffusion_jax.models.layers.dtypes import Dtypes

# Path of the weight whose gradients balance reconstruction and adversary (Esser et al. 2021).
LAST_LAYER = ("decoder", "conv_out", "kernel")


@dataclasses.dataclass(kw_only=True, repr=False, eq=False)
class Fields(Dtypes):
    """What encoder, decoder and autoencoder are made from; the defaults are kl-f8.

    ch, ch_mult, num_res_blocks: widths ch * ch_mult per level, with blocks per level (the decoder
      has one more). Level 0 has the full resolution; f = 2^(levels - 1).
    attn_resolutions: sides at which blocks attend, counted from `resolution`, whatever the sides
      of the image; the middle always attends. attn_type: "vanilla", or "none" for no attention
      anywhere; "vanilla-xformers" is another name of "vanilla".
    z_channels: what the encoder gives, twice as many with double_z, and the decoder reads.
    resamp_with_conv: whether convolutions halve and double the sides. give_pre_end: the decoder
      returns what its last norm would see; tanh_out: it ends in tanh.
    dtype: what most is computed in; norms and softmax use float32, the last layers the input's
      dtype. param_dtype: what is stored. remat: False, True or a row of basic.REMAT_POLICIES.
    """

    ch: int = 128
    ch_mult: Sequence[int] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: Sequence[int] = ()
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 4
    double_z: bool = True
    attn_type: str = "vanilla"
    dropout: float = 0.0
    resamp_with_conv: bool = True
    tanh_out: bool = False
    give_pre_end: bool = False
    num_groups: int = 32
    attention_impl: str = "auto"
    remat: bool | str = False


class Encoder(Fields, nn.Module):
    """The encoder of latent diffusion: blocks per level, halved sides in between, the middle.

    Source: latent diffusion, modules/diffusionmodules/model.py, Encoder.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 z"]:
        """Encode x [b h w in_channels] -> [b h/f w/f z_channels (x 2 with double_z)].

        Raises ValueError when fields or the sides of x do not fit.
        """
        check_options(self)
        self._check_image(x)
        res_block, attend = block_makers(self, train=train)
        h = conv(self.in_channels, self.ch, name="conv_in", **self.dtypes)(x.astype(self.dtype))
        for level, mult in enumerate(self.ch_mult):
            attends = self.resolution // 2**level in self.attn_resolutions
            for i in range(self.num_res_blocks):
                h = res_block(h, self.ch * mult, f"down_{level}_block_{i}")
                h = attend(h, f"down_{level}_attn_{i}") if attends else h
            if level < len(self.ch_mult) - 1:
                name = f"down_{level}_downsample"
                h = HalveSides(self.resamp_with_conv, name=name, **self.dtypes)(h)
        h = res_block(h, h.shape[-1], "mid_block_1")
        h = attend(h, "mid_attn_1")
        h = res_block(h, h.shape[-1], "mid_block_2")
        out = {"dtype": x.dtype, "param_dtype": self.param_dtype}
        h = GroupNorm(self.num_groups, EPSILON, silu=True, name="norm_out", **out)(h)
        features = 2 * self.z_channels if self.double_z else self.z_channels
        return conv(h.shape[-1], features, name="conv_out", **out)(h.astype(x.dtype))

    @nn.nowrap
    def _check_image(self, x: Array) -> None:
        factor = 2 ** (len(self.ch_mult) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"the image is {x.shape[1]} x {x.shape[2]} pixels; "
                f"both should be multiples of {factor}"
            )
        if x.shape[-1] != self.in_channels:
            raise ValueError(
                f"the image has {x.shape[-1]} channels and in_channels = {self.in_channels}"
            )


class Decoder(Fields, nn.Module):
    """The decoder of latent diffusion: the middle, blocks per level, doubled sides in between.

    Source: latent diffusion, modules/diffusionmodules/model.py, Decoder.
    """

    @nn.compact
    def __call__(
        self, z: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 o"]:
        """Decode z [b h w z_channels] -> [b fh fw out_ch].

        Raises ValueError when fields or the channels of z do not fit.
        """
        check_options(self)
        return run_decoder(self, z, *block_makers(self, train=train))


def run_decoder(
    network: Any,
    z: Float[Array, "b h w c"],
    res_block: Callable[[Array, int, str], Array],
    attend: Callable[[Array, str], Array],
    last: Callable[[Array], Array] = lambda h: h,
) -> Float[Array, "b h2 w2 o"]:
    """Run the levels of a decoder, which become children of the calling module.

    network: the module, with Fields. res_block, attend: as blocks.block_makers makes them. last:
    what follows the last convolution. Raises ValueError when the channels of z do not fit.
    """
    if z.shape[-1] != network.z_channels:
        raise ValueError(f"z has {z.shape[-1]} channels and z_channels = {network.z_channels}")
    widest = network.ch * network.ch_mult[-1]
    h = conv(network.z_channels, widest, name="conv_in", **network.dtypes)(z.astype(network.dtype))
    h = res_block(h, widest, "mid_block_1")
    h = attend(h, "mid_attn_1")
    h = res_block(h, widest, "mid_block_2")
    for level in reversed(range(len(network.ch_mult))):
        attends = network.resolution // 2**level in network.attn_resolutions
        for i in range(network.num_res_blocks + 1):
            h = res_block(h, network.ch * network.ch_mult[level], f"up_{level}_block_{i}")
            h = attend(h, f"up_{level}_attn_{i}") if attends else h
        if level:
            name = f"up_{level}_upsample"
            h = Upsample(h.shape[-1], network.resamp_with_conv, name=name, **network.dtypes)(h)
    if network.give_pre_end:
        return h
    out = {"dtype": z.dtype, "param_dtype": network.param_dtype}
    h = GroupNorm(network.num_groups, EPSILON, silu=True, name="norm_out", **out)(h)
    h = last(conv(h.shape[-1], network.out_ch, name="conv_out", **out)(h.astype(z.dtype)))
    return jnp.tanh(h) if network.tanh_out else h


class Autoencoder(Fields, nn.Module):
    """Image <-> latent: encode(image) -> moments or codes, decode(z) -> image.

    `encode` gives [mean, log variance] with double_z, else one latent; a regularizer or quantizer
    (regularizers.py, quantizers.py) makes z of it. The defaults are kl-f8, the first stage of
    Stable Diffusion 1, 2 and XL.

    embed_dim: channels of the latent. use_quant_conv: 1 x 1 convolutions between the latent and
      the z_channels of encoder and decoder; without them embed_dim is z_channels. See Fields for
      the others.

    Raises ValueError, with the value and what would be right, when fields or inputs do not fit.
    Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
    appendix E.1 and G; without quant_conv Blattmann et al. 2023, "Stable Video Diffusion".
    """

    embed_dim: int = 4
    use_quant_conv: bool = True
    decoder_only: bool = False

    @property
    def last_layer(self) -> tuple[str, ...]:
        """Path of the weight whose gradients balance reconstruction and adversary."""
        return LAST_LAYER

    def setup(self) -> None:
        """Make encoder and decoder, and the convolutions around the latent."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Fields)}
        self.decoder = Decoder(**fields)
        if not self.decoder_only:
            self.encoder = Encoder(**fields)
        if self.use_quant_conv:
            # Without a dtype of their own they compute in the wider of input and parameters.
            parts = 2 if self.double_z else 1
            options = {"dtype": None, "param_dtype": self.param_dtype}
            width, latent = self.z_channels, self.embed_dim
            if not self.decoder_only:
                self.quant_conv = conv(parts * width, parts * latent, (1, 1), **options)
            self.post_quant_conv = conv(latent, width, (1, 1), **options)
        elif self.embed_dim != self.z_channels:
            raise ValueError(
                f"embed_dim = {self.embed_dim} needs use_quant_conv = True, "
                f"or should be z_channels = {self.z_channels}"
            )

    def encode(
        self, image: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 m"]:
        """Encode an image in [-1, 1]: [b h w c] -> [b h/f w/f embed_dim (x 2 with double_z)]."""
        if self.decoder_only:
            raise ValueError(
                "decoder_only = True should be False: there is no encoder to encode with"
            )
        h = self.encoder(image, train=train)
        return self.quant_conv(h).astype(image.dtype) if self.use_quant_conv else h

    def decode(
        self, z: Float[Array, "b h w d"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 o"]:
        """Decode a latent, unscaled: [b h w embed_dim] -> an image [b fh fw out_ch] in [-1, 1]."""
        h = self.post_quant_conv(z).astype(z.dtype) if self.use_quant_conv else z
        return self.decoder(h, train=train)

    def __call__(
        self, image: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b h2 w2 o"]:
        """Decode what was encoded, a Gaussian by its mean; `init` makes all parameters with it.

        With decoder_only zeros are decoded.
        """
        if self.decoder_only:
            factor = 2 ** (len(self.ch_mult) - 1)
            sides = (side // factor for side in image.shape[1:3])
            return self.decode(jnp.zeros((image.shape[0], *sides, self.embed_dim), image.dtype))
        moments = self.encode(image, train=train)
        return self.decode(moments[..., : self.embed_dim], train=train)
