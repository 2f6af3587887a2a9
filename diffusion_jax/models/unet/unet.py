"""The UNet of guided-diffusion, latent diffusion, Stable Diffusion 1 and 2, and SDXL."""

from collections.abc import Sequence

import flax.linen as nn
from einops import rearrange
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.attention import AttentionBlock
from diffusion_jax.models.layers.basic import conv, rematerialised
from diffusion_jax.models.layers.transformer import SpatialTransformer
from diffusion_jax.models.unet.options import Fields, check_inputs, check_options
from diffusion_jax.models.unet.resblock import ResBlock
from diffusion_jax.models.unet.skeleton import (
    Blocks,
    embed_classes,
    embed_timesteps,
    head,
    heads_of,
    run_blocks,
    transformer_fields,
)

Context = Float[Array, "b m d"] | Sequence[Float[Array, "b _ _"]] | None


class UNet(Fields, nn.Module):
    """Denoising UNet: (x [b h w c], t [b], context, y) -> [b h w out_channels] of x's dtype.

    The fields carry the names of the released configs. num_res_blocks, transformer_depth,
    num_attention_blocks and disable_self_attentions may have one entry per level of channel_mult.

    attention_resolutions: downsampling factors (1, 2, 4, ...) at which attention follows ResBlocks;
        the middle block always attends unless disable_middle_transformer.
    num_heads, num_head_channels: give one, -1 is for none; num_head_channels wins. legacy is latent
        diffusion's rule: num_head_channels only chooses how many heads share the channels.
    use_spatial_transformer: transformers (context allowed) instead of plain attention blocks.
    context_dim: width of the context, or one width per transformer block; None for no context.
    num_classes: what y is. None: no y. An int: labels int [b]. "continuous": a number [b].
        "timestep": a number [b], embedded like t. "sequential": features [b adm_in_channels].
    n_embed: the output is n_embed logits over the codes of a codebook instead of an image.
    patch_size: side of the squares of pixels that become channels inside the network.
    time_cond_proj_dim: width in which the scale of guidance is embedded, for a network that was
        distilled with guidance (LCM); guidance [b] is that scale, None for 1.
    embeds_duration: whether the network also reads duration [b], how far a step of MeanFlow goes in
        the units of t; None for 0. A network begins as one that does not read it.
    dtype: what most is computed in; norms and softmax use float32, the last layer x's dtype.
        param_dtype: what is stored.
    remat: False, True or a name of layers.REMAT_POLICIES; scan: see transformer.stack_blocks.

    Raises ValueError, with the value and what would be right, when options or inputs do not fit.
    Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis"; Rombach et al.
    2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; Podell et al. 2023,
    "SDXL".
    """

    num_heads_upsample: int = -1
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    context_dim: int | Sequence[int] | None = None
    disable_self_attentions: Sequence[bool] | None = None
    num_attention_blocks: Sequence[int] | None = None
    disable_middle_self_attn: bool = False
    disable_middle_transformer: bool = False
    legacy: bool = False
    n_embed: int | None = None
    patch_size: int = 1
    time_cond_proj_dim: int | None = None
    embeds_duration: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, "b"],
        context: Context = None,
        y: Num[Array, "b ..."] | None = None,
        *,
        control: Sequence[Array] | None = None,
        guidance: Num[Array, "b"] | None = None,
        duration: Num[Array, "b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w o"]:
        """Denoise x.

        control: what a ControlNet adds to the activations that the way up sees, and to the last
        one of the middle.
        """
        check_options(self)
        check_inputs(self, x, context, y)
        emb = embed_levels(self, t, y, guidance, duration)
        blocks = image_blocks(self, emb, context, train=train)
        h = run_blocks(self, stem(self, x), blocks, control)
        return pixels(self, head(self, h.astype(x.dtype), x.dtype))


def embed_levels(
    options: UNet,
    t: Array,
    y: Array | None,
    guidance: Array | None = None,
    duration: Array | None = None,
) -> Array:
    """Embed the timesteps t [b], and what else there is -> [b 4 model_channels]; see UNet."""
    emb = embed_timesteps(options, t, guidance, duration)
    return emb if y is None else emb + embed_classes(options, y)


def stem(options: UNet, x: Array) -> Array:
    """Compute the first activation of an image -> [b h w model_channels]."""
    patch = {"p": options.patch_size, "q": options.patch_size}
    h = rearrange(x.astype(options.dtype), "b (h p) (w q) c -> b h w (p q c)", **patch)
    dtypes = options.dtypes
    return conv(h.shape[-1], options.model_channels, name="input_blocks_0_0", **dtypes)(h)


def pixels(options: UNet, h: Array) -> Array:
    """Lay out the channels of a patch as its pixels; the inverse of what stem begins with."""
    patch = {"p": options.patch_size, "q": options.patch_size}
    return rearrange(h, "b h w (p q c) -> b (h p) (w q) c", **patch)


def image_blocks(options: UNet, emb: Array, context: Context, *, train: bool) -> Blocks:
    """Make the blocks of a UNet of images, which see the embedding and the context."""
    dropout = options.dropout if train else 0.0

    def residual(h: Array, channels: int, name: str, **resampling: bool) -> Array:
        return rematerialised(ResBlock, options.remat)(
            channels,
            dropout=dropout,
            use_scale_shift_norm=options.use_scale_shift_norm,
            num_groups=options.num_groups,
            name=name,
            **options.dtypes,
            **resampling,
        )(h, emb)

    def attend(h: Array, level: int | None, name: str, up: bool) -> Array:
        if not options.use_spatial_transformer:
            return _attention_block(options, h.shape[-1], name, up)(h)
        fields = transformer_fields(options, h.shape[-1], level, dropout, up)
        return SpatialTransformer(name=name, **fields)(h, context)

    return Blocks(residual, attend)


def _attention_block(options: UNet, channels: int, name: str, up: bool) -> nn.Module:
    heads, head_dim = heads_of(options, channels, up)
    return rematerialised(AttentionBlock, options.remat)(
        channels // head_dim if options.num_head_channels != -1 else heads,
        new_order=options.use_new_attention_order,
        num_groups=options.num_groups,
        attention_impl=options.attention_impl,
        name=name,
        **options.dtypes,
    )
