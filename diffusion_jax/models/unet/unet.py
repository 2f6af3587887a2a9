"""The UNet of guided-diffusion, latent diffusion, Stable Diffusion 1 and 2, and SDXL."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Num

from diffusion_jax.models.layers.attention import AttentionBlock
from diffusion_jax.models.layers.basic import (
    Downsample,
    GroupNorm,
    Upsample,
    conv,
    dense,
    rematerialised,
    timestep_embedding,
)
from diffusion_jax.models.layers.transformer import SpatialTransformer
from diffusion_jax.models.unet.options import check_inputs, check_options, per_level
from diffusion_jax.models.unet.resblock import ResBlock

Context = Float[Array, "b m d"] | Sequence[Float[Array, "b _ _"]] | None


class UNet(nn.Module):
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
    dtype: what most is computed in; norms and softmax use float32, the last layer x's dtype.
        param_dtype: what is stored.
    remat: False, True or a name of layers.REMAT_POLICIES; scan: see transformer.stack_blocks.

    Raises ValueError, with the value and what would be right, when options or inputs do not fit.
    Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis"; Rombach et al.
    2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; Podell et al. 2023,
    "SDXL".
    """

    out_channels: int
    model_channels: int = 32
    channel_mult: Sequence[int] = (1, 2, 2)
    num_res_blocks: int | Sequence[int] = 4
    attention_resolutions: Sequence[int] = ()
    dropout: float = 0.0
    conv_resample: bool = True
    num_classes: int | str | None = None
    adm_in_channels: int | None = None
    num_heads: int = 1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_spatial_transformer: bool = False
    transformer_depth: int | Sequence[int] = 1
    context_dim: int | Sequence[int] | None = None
    disable_self_attentions: Sequence[bool] | None = None
    num_attention_blocks: Sequence[int] | None = None
    disable_middle_self_attn: bool = False
    disable_middle_transformer: bool = False
    use_linear_in_transformer: bool = False
    legacy: bool = False
    n_embed: int | None = None
    num_groups: int = 32
    patch_size: int = 1
    attention_impl: str = "auto"
    remat: bool | str = False
    scan: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, "b"],
        context: Context = None,
        y: Num[Array, "b ..."] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w o"]:
        check_options(self)
        check_inputs(self, x, context, y)
        dropout = self.dropout if train else 0.0
        emb = self._time_embedding(t)
        if y is not None:
            emb = emb + self._label_embedding(y)

        patch = {"p": self.patch_size, "q": self.patch_size}
        h = rearrange(x.astype(self.dtype), "b (h p) (w q) c -> b h w (p q c)", **patch)
        h = conv(h.shape[-1], self.model_channels, name="input_blocks_0_0", **self._dtypes())(h)
        skips = self._down(h, emb, context, dropout)
        h = self._middle(skips[-1], emb, context, dropout)
        h = self._up(h, skips, emb, context, dropout)
        h = self._head(h.astype(x.dtype), x.dtype)
        return rearrange(h, "b h w (p q c) -> b (h p) (w q) c", **patch)

    @nn.nowrap
    def _down(self, h: Array, emb: Array, context: Any, dropout: float) -> list[Array]:
        """Run the input blocks; returns every activation that the way up will see again."""
        skips = [h]
        res_blocks = per_level(self, "num_res_blocks")
        last = len(self.channel_mult) - 1
        for level, mult in enumerate(self.channel_mult):
            for i in range(res_blocks[level]):
                name = f"input_blocks_{len(skips)}"
                h = self._res_block(self.model_channels * mult, dropout, f"{name}_0")(h, emb)
                if self._attends(level, i):
                    h = self._attend(h, context, level, dropout, f"{name}_1")
                skips.append(h)
            if level != last:
                name = f"input_blocks_{len(skips)}_0"
                if self.resblock_updown:
                    h = self._res_block(h.shape[-1], dropout, name, down=True)(h, emb)
                else:
                    h = Downsample(h.shape[-1], self.conv_resample, name=name, **self._dtypes())(h)
                skips.append(h)
        return skips

    @nn.nowrap
    def _middle(self, h: Array, emb: Array, context: Any, dropout: float) -> Array:
        h = self._res_block(h.shape[-1], dropout, "middle_block_0")(h, emb)
        if not self.disable_middle_transformer:
            h = self._attend(h, context, None, dropout, "middle_block_1")
        return self._res_block(h.shape[-1], dropout, "middle_block_2")(h, emb)

    @nn.nowrap
    def _up(self, h: Array, skips: list[Array], emb: Array, context: Any, dropout: float) -> Array:
        skips = list(skips)
        res_blocks = per_level(self, "num_res_blocks")
        blocks = 0
        for level in reversed(range(len(self.channel_mult))):
            for i in range(res_blocks[level] + 1):
                name = f"output_blocks_{blocks}"
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                channels = self.model_channels * self.channel_mult[level]
                h = self._res_block(channels, dropout, f"{name}_0")(h, emb)
                attends = self._attends(level, i)
                if attends:
                    h = self._attend(h, context, level, dropout, f"{name}_1", up=True)
                if level and i == res_blocks[level]:
                    name = f"{name}_{2 if attends else 1}"
                    if self.resblock_updown:
                        h = self._res_block(channels, dropout, name, up=True)(h, emb)
                    else:
                        h = Upsample(channels, self.conv_resample, name=name, **self._dtypes())(h)
                blocks += 1
        return h

    @nn.nowrap
    def _head(self, h: Array, dtype: Any) -> Array:
        dtypes = {"dtype": dtype, "param_dtype": self.param_dtype}
        channels = h.shape[-1]
        patch_area = self.patch_size**2
        if self.n_embed is not None:
            h = GroupNorm(self.num_groups, name="id_predictor_0", **dtypes)(h)
            features = self.n_embed * patch_area
            return conv(channels, features, (1, 1), name="id_predictor_1", **dtypes)(h)
        h = GroupNorm(self.num_groups, silu=True, name="out_0", **dtypes)(h)
        features = self.out_channels * patch_area
        return conv(channels, features, zero=True, name="out_2", **dtypes)(h)

    @nn.nowrap
    def _time_embedding(self, t: Array) -> Array:
        sinusoids = timestep_embedding(t, self.model_channels).astype(self.dtype)
        return self._mlp(sinusoids, "time_embed")

    @nn.nowrap
    def _label_embedding(self, y: Array) -> Array:
        width = 4 * self.model_channels
        if isinstance(self.num_classes, int):
            normal = nn.initializers.normal(1.0)
            labels = nn.Embed(
                self.num_classes, width, embedding_init=normal, name="label_emb", **self._dtypes()
            )
            return labels(y)
        if self.num_classes == "continuous":
            number = y.astype(self.dtype)[:, None]
            return dense(1, width, name="label_emb", **self._dtypes())(number)
        if self.num_classes == "timestep":
            sinusoids = timestep_embedding(y, self.model_channels).astype(self.dtype)
            return self._mlp(sinusoids, "label_emb_1")
        return self._mlp(y.astype(self.dtype), "label_emb_0")

    @nn.nowrap
    def _mlp(self, h: Array, name: str) -> Array:
        width = 4 * self.model_channels
        h = dense(h.shape[-1], width, name=f"{name}_0", **self._dtypes())(h)
        return dense(width, width, name=f"{name}_2", **self._dtypes())(nn.silu(h))

    @nn.nowrap
    def _res_block(self, channels: int, dropout: float, name: str, **kwargs: bool) -> nn.Module:
        return rematerialised(ResBlock, self.remat)(
            channels,
            dropout=dropout,
            use_scale_shift_norm=self.use_scale_shift_norm,
            num_groups=self.num_groups,
            name=name,
            **self._dtypes(),
            **kwargs,
        )

    @nn.nowrap
    def _attends(self, level: int, block: int) -> bool:
        if 2**level not in self.attention_resolutions:
            return False
        return self.num_attention_blocks is None or block < self.num_attention_blocks[level]

    @nn.nowrap
    def _attend(
        self,
        h: Array,
        context: Any,
        level: int | None,
        dropout: float,
        name: str,
        up: bool = False,
    ) -> Array:
        """Attend at a level, or with None in the middle block."""
        heads, head_dim = self._heads(h.shape[-1], up)
        common = {"num_groups": self.num_groups, "attention_impl": self.attention_impl}
        if not self.use_spatial_transformer:
            heads = h.shape[-1] // head_dim if self.num_head_channels != -1 else heads
            return rematerialised(AttentionBlock, self.remat)(
                heads, new_order=self.use_new_attention_order, name=name, **common, **self._dtypes()
            )(h)
        if level is None:
            disabled = self.disable_middle_self_attn
        else:
            disabled = bool(self.disable_self_attentions and self.disable_self_attentions[level])
        return SpatialTransformer(
            heads,
            head_dim,
            depth=per_level(self, "transformer_depth")[-1 if level is None else level],
            dropout=dropout,
            disable_self_attn=disabled,
            use_linear=self.use_linear_in_transformer,
            remat=self.remat,
            scan=self.scan,
            name=name,
            **common,
            **self._dtypes(),
        )(h, context)

    @nn.nowrap
    def _heads(self, channels: int, up: bool) -> tuple[int, int]:
        if self.num_head_channels != -1:
            heads = channels // self.num_head_channels
            return heads, channels // heads if self.legacy and heads else self.num_head_channels
        heads = self.num_heads_upsample if up and self.num_heads_upsample != -1 else self.num_heads
        return heads, channels // heads

    @nn.nowrap
    def _dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}
