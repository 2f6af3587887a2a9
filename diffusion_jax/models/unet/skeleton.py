"""What the UNets share: embeddings of timestep and class, the order of the blocks, and the head.

Every function takes the options of a UNet, which is anything with its fields, and is called inside
of a compact method: the layers become children of the calling module.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.models.layers.basic import (
    Downsample,
    GroupNorm,
    Upsample,
    conv,
    dense,
    guidance_embedding,
    timestep_embedding,
)
from diffusion_jax.models.unet.options import check_numbers, per_level


class Blocks(NamedTuple):
    """The two kinds of blocks that a UNet is made of.

    residual: (h, channels, name, up=False, down=False) -> h of that many channels.
    attend: (h, level, name, up) -> h; level is None in the middle block.
    """

    residual: Callable[..., Array]
    attend: Callable[[Array, int | None, str, bool], Array]


def run_blocks(
    options: Any, h: Array, blocks: Blocks, control: Sequence[Array] | None = None
) -> Array:
    """Run the way down, the middle and the way up: h [b h w model_channels] -> the same shape.

    control: what is added to the activations that run_encoder gives.
    """
    *skips, h = run_encoder(options, h, blocks)
    if control is not None:
        *skips, h = [own + more for own, more in zip((*skips, h), control, strict=True)]
    return _up(options, h, skips, blocks)


def run_encoder(options: Any, h: Array, blocks: Blocks) -> list[Array]:
    """Run the way down and the middle -> what the way up sees again, and after it the middle."""
    skips = _down(options, h, blocks)
    h = blocks.residual(skips[-1], skips[-1].shape[-1], "middle_block_0")
    if not options.disable_middle_transformer:
        h = blocks.attend(h, None, "middle_block_1", False)
    return [*skips, blocks.residual(h, h.shape[-1], "middle_block_2")]


def _down(options: Any, h: Array, blocks: Blocks) -> list[Array]:
    """Run the input blocks; returns every activation that the way up will see again."""
    skips = [h]
    res_blocks = per_level(options, "num_res_blocks")
    last = len(options.channel_mult) - 1
    for level, mult in enumerate(options.channel_mult):
        for i in range(res_blocks[level]):
            name = f"input_blocks_{len(skips)}"
            h = blocks.residual(h, options.model_channels * mult, f"{name}_0")
            if attends(options, level, i):
                h = blocks.attend(h, level, f"{name}_1", False)
            skips.append(h)
        if level != last:
            name = f"input_blocks_{len(skips)}_0"
            if options.resblock_updown:
                h = blocks.residual(h, h.shape[-1], name, down=True)
            else:
                sampling = {"name": name, **options.dtypes}
                h = Downsample(h.shape[-1], options.conv_resample, **sampling)(h)
            skips.append(h)
    return skips


def _up(options: Any, h: Array, skips: list[Array], blocks: Blocks) -> Array:
    skips = list(skips)
    res_blocks = per_level(options, "num_res_blocks")
    count = 0
    for level in reversed(range(len(options.channel_mult))):
        for i in range(res_blocks[level] + 1):
            name = f"output_blocks_{count}"
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            channels = options.model_channels * options.channel_mult[level]
            h = blocks.residual(h, channels, f"{name}_0")
            attended = attends(options, level, i)
            if attended:
                h = blocks.attend(h, level, f"{name}_1", True)
            if level and i == res_blocks[level]:
                name = f"{name}_{2 if attended else 1}"
                if options.resblock_updown:
                    h = blocks.residual(h, channels, name, up=True)
                else:
                    sampling = {"name": name, **options.dtypes}
                    h = Upsample(channels, options.conv_resample, **sampling)(h)
            count += 1
    return h


def attends(options: Any, level: int, block: int) -> bool:
    """Tell whether attention follows a residual block of a level."""
    if 2**level not in options.attention_resolutions:
        return False
    return options.num_attention_blocks is None or block < options.num_attention_blocks[level]


def heads_of(options: Any, channels: int, up: bool) -> tuple[int, int]:
    """Find the number of attention heads for so many channels, and their width."""
    if options.num_head_channels != -1:
        heads = channels // options.num_head_channels
        return heads, channels // heads if options.legacy and heads else options.num_head_channels
    heads = options.num_heads
    if up and options.num_heads_upsample != -1:
        heads = options.num_heads_upsample
    return heads, channels // heads


def transformer_fields(
    options: Any,
    channels: int,
    level: int | None,
    dropout: float,
    up: bool,
    depth_middle: int | None = None,
) -> dict[str, Any]:
    """Choose the fields of the transformer of a level, or with None of the middle block.

    depth_middle: blocks of the middle transformer, None for as many as the last level.
    """
    heads, head_dim = heads_of(options, channels, up)
    if level is None:
        disabled = options.disable_middle_self_attn
        depth = (
            per_level(options, "transformer_depth")[-1] if depth_middle is None else depth_middle
        )
    else:
        depth = per_level(options, "transformer_depth")[level]
        disabled = bool(options.disable_self_attentions and options.disable_self_attentions[level])
    return {
        "num_heads": heads,
        "head_dim": head_dim,
        "depth": depth,
        "dropout": dropout,
        "disable_self_attn": disabled,
        "use_linear": options.use_linear_in_transformer,
        "num_groups": options.num_groups,
        "attention_impl": options.attention_impl,
        "remat": options.remat,
        "scan": options.scan,
        **options.dtypes,
    }


def embed_timesteps(
    options: Any, t: Array, guidance: Array | None = None, duration: Array | None = None
) -> Array:
    """Embed t [b], and guidance [b] and duration [b] where a network reads them.

    Returns [b 4 model_channels]. Raises ValueError for a number that the network does not read.
    """
    check_numbers(options, guidance, duration)
    channels = options.model_channels
    h = timestep_embedding(t, channels).astype(options.dtype)
    if options.time_cond_proj_dim is not None:
        width = options.time_cond_proj_dim
        scale = jnp.ones(t.shape) if guidance is None else guidance
        features = guidance_embedding(scale, width).astype(options.dtype)
        names = {"name": "time_embed_cond_proj", **options.dtypes}
        h = h + dense(width, channels, use_bias=False, **names)(features)
    emb = _mlp(options, h, "time_embed")
    if options.embeds_duration:
        length = jnp.zeros(t.shape) if duration is None else duration
        features = timestep_embedding(length, channels).astype(options.dtype)
        emb = emb + _mlp(options, features, "duration_embed", zero=True)
    return emb


def embed_classes(options: Any, y: Array) -> Array:
    """Embed y, which num_classes describes, [b ...] -> [b 4 model_channels]."""
    width, dtypes = 4 * options.model_channels, options.dtypes
    if isinstance(options.num_classes, int):
        normal = nn.initializers.normal(1.0)
        labels = nn.Embed(
            options.num_classes, width, embedding_init=normal, name="label_emb", **dtypes
        )
        return labels(y)
    if options.num_classes == "continuous":
        number = y.astype(options.dtype)[:, None]
        return dense(1, width, name="label_emb", **dtypes)(number)
    if options.num_classes == "timestep":
        sinusoids = timestep_embedding(y, options.model_channels).astype(options.dtype)
        return _mlp(options, sinusoids, "label_emb_1")
    return _mlp(options, y.astype(options.dtype), "label_emb_0")


def _mlp(options: Any, h: Array, name: str, *, zero: bool = False) -> Array:
    width = 4 * options.model_channels
    h = dense(h.shape[-1], width, name=f"{name}_0", **options.dtypes)(h)
    return dense(width, width, zero=zero, name=f"{name}_2", **options.dtypes)(nn.silu(h))


def head(options: Any, h: Array, dtype: Any) -> Array:
    """Turn the last activation [b h w c] into the output, computed in dtype."""
    dtypes = {"dtype": dtype, "param_dtype": options.param_dtype}
    channels = h.shape[-1]
    patch_area = options.patch_size**2
    if options.n_embed is not None:
        h = GroupNorm(options.num_groups, name="id_predictor_0", **dtypes)(h)
        features = options.n_embed * patch_area
        return conv(channels, features, (1, 1), name="id_predictor_1", **dtypes)(h)
    h = GroupNorm(options.num_groups, silu=True, name="out_0", **dtypes)(h)
    features = options.out_channels * patch_area
    return conv(channels, features, zero=True, name="out_2", **dtypes)(h)
