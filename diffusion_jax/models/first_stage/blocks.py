"""Blocks of the first-stage networks: residual block, attention over pixels, halving."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.models.layers.attention import attention
from diffusion_jax.models.layers.basic import (
    GroupNorm,
    average_pool,
    conv,
    rematerialised,
    torch_uniform,
)
from diffusion_jax.models.layers.convolution import convolve
from diffusion_jax.models.layers.dtypes import Dtypes

EPSILON = 1e-6
ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "none")


class ResnetBlock(Dtypes, nn.Module):
    """Residual block: shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))))))).

    x [b h w c] -> [b h w out_channels]; the shortcut is a 1 x 1 convolution (nin_shortcut) where
    the channels change. A dropout above 0 draws from the rng "dropout".
    Source: latent diffusion, modules/diffusionmodules/model.py, ResnetBlock without timestep.
    """

    out_channels: int
    dropout: float = 0.0
    num_groups: int = 32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
        return residual(self, x)


def residual(block: Any, x: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
    """Run the layers of a residual block, which become children of the calling module.

    block: the module, with the fields of ResnetBlock.
    """
    features = block.out_channels
    h = GroupNorm(block.num_groups, EPSILON, silu=True, name="norm1", **block.dtypes)(x)
    h = conv(x.shape[-1], features, name="conv1", **block.dtypes)(h)
    h = GroupNorm(block.num_groups, EPSILON, silu=True, name="norm2", **block.dtypes)(h)
    h = nn.Dropout(block.dropout, deterministic=False)(h)
    h = conv(features, features, name="conv2", **block.dtypes)(h)
    if x.shape[-1] != features:
        x = conv(x.shape[-1], features, (1, 1), name="nin_shortcut", **block.dtypes)(x)
    return x + h


class AttnBlock(Dtypes, nn.Module):
    """Self-attention over the pixels, one head of all channels: x + proj_out(attention(norm(x))).

    x [b h w c] -> [b h w c]; q, k, v and proj_out are 1 x 1 convolutions.
    Source: latent diffusion, modules/diffusionmodules/model.py, AttnBlock.
    """

    num_groups: int = 32
    attention_impl: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return attend_pixels(self, x)


def attend_pixels(
    block: Any, x: Float[Array, "b h w c"], mix: Callable[[Array], Array] = lambda h: h
) -> Float[Array, "b h w c"]:
    """Run the layers of an attention block, which become children of the calling module.

    block: the module, with the fields of AttnBlock. mix: what is done to the attention's result
    [b h w c] before its last projection.
    """
    height, channels = x.shape[1], x.shape[-1]
    h = GroupNorm(block.num_groups, EPSILON, name="norm", **block.dtypes)(x)
    q, k, v = (
        rearrange(
            conv(channels, channels, (1, 1), name=name, **block.dtypes)(h), "b h w c -> b (h w) 1 c"
        )
        for name in ("q", "k", "v")
    )
    h = attention(q, k, v, implementation=block.attention_impl)
    h = mix(rearrange(h, "b (h w) 1 c -> b h w c", h=height))
    return x + conv(channels, channels, (1, 1), name="proj_out", **block.dtypes)(h)


class HalveSides(Dtypes, nn.Module):
    """Halve height and width: a convolution of stride 2 (`conv`), or averages of 2 x 2 pixels.

    x [b h w c] -> [b h/2 w/2 c]. The convolution pads one row below and one column to the right,
    none above and to the left. Source: latent diffusion, model.py, Downsample.
    """

    use_conv: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if not self.use_conv:
            return average_pool(x)
        uniform = torch_uniform(9 * x.shape[-1])
        return nn.Conv(
            x.shape[-1],
            (3, 3),
            strides=2,
            padding=[(0, 1), (0, 1)],
            kernel_init=uniform,
            bias_init=uniform,
            conv_general_dilated=convolve,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )(x)


def block_makers(
    network: Any, *, train: bool
) -> tuple[Callable[[Array, int, str], Array], Callable[[Array, str], Array]]:
    """Make what an encoder or decoder builds its levels of, from its fields.

    Returns res_block(h, channels, name) -> h and attend(h, name) -> h; attend is the identity
    where attn_type = "none". To be called within the network's compact method.
    """
    common = {
        "num_groups": network.num_groups,
        "dtype": network.dtype,
        "param_dtype": network.param_dtype,
    }
    dropout = network.dropout if train else 0.0

    def res_block(h: Array, channels: int, name: str) -> Array:
        block = rematerialised(ResnetBlock, network.remat)
        return block(channels, dropout=dropout, name=name, **common)(h)

    def attend(h: Array, name: str) -> Array:
        if network.attn_type == "none":
            return h
        block = rematerialised(AttnBlock, network.remat)
        return block(attention_impl=network.attention_impl, name=name, **common)(h)

    return res_block, attend


def check_options(network: Any) -> None:
    """Raise ValueError where the fields of an encoder or decoder do not fit each other."""
    if not network.ch_mult:
        raise ValueError("ch_mult is empty; give one multiple of ch per level")
    for name in ("ch", "num_res_blocks", "z_channels"):
        if getattr(network, name) < 1:
            raise ValueError(f"{name} = {getattr(network, name)} should be at least 1")
    if network.attn_type not in ATTENTION_TYPES:
        raise ValueError(
            f"attn_type = {network.attn_type!r} is unknown; "
            f"choose one of {', '.join(ATTENTION_TYPES)}"
        )
    sides = [network.resolution // 2**level for level in range(len(network.ch_mult))]
    for side in network.attn_resolutions:
        if side not in sides:
            raise ValueError(
                f"attn_resolutions = {tuple(network.attn_resolutions)} names no level: resolution "
                f"= {network.resolution} and ch_mult make levels of {', '.join(map(str, sides))} "
                "pixels"
            )
