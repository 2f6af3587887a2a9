"""Layers that the networks share: convolution, dense, GroupNorm, resampling, timestep embedding.

Convolutions and dense layers start as PyTorch starts them.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Num

from diffusion_jax.devices.placement import by_sample
from diffusion_jax.models.layers.convolution import convolve
from diffusion_jax.models.layers.dtypes import Dtypes
from diffusion_jax.models.layers.flash_attention import FLASH
from diffusion_jax.models.layers.norm import group_norm, layer_norm

# The name of every product with a weight, for the policies of remat.
PRODUCT = "product"
# What a rematerialised block keeps for its backward pass besides its inputs.
REMAT_POLICIES = (
    "none",  # everything: no remat
    "full",  # nothing
    "dots",  # products with weights, convolutions too, and what a flash kernel gives
    "offload",  # the same, in the memory of the host
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
)


@cache
def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Draw from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for weights and biases.

    Returns (key, shape, dtype) -> array.
    Source: torch.nn.Linear and Conv2d, kaiming_uniform with a = sqrt(5).
    """
    bound = 1.0 / math.sqrt(fan_in)

    # Traced once for each shape: Flax traces it again wherever it checks a parameter's shape.
    @partial(jax.jit, static_argnames=("shape", "dtype", "out_sharding"), inline=True)
    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


def identity_kernel(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> Array:
    """Make the kernel of a convolution that changes nothing: each channel is its own centre tap.

    shape has the sides of the kernel, then the channels twice, as initializers get it.
    """
    del key
    *sides, channels, features = shape
    centre = tuple(side // 2 for side in sides)
    return jnp.zeros(shape, dtype).at[centre].set(jnp.eye(channels, features, dtype=dtype))


def conv(
    in_channels: int,
    features: int,
    kernel_size: tuple[int, ...] = (3, 3),
    *,
    stride: int = 1,
    zero: bool = False,
    kernel_init: nn.initializers.Initializer | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """Make a convolution padded by kernel_size // 2 on both sides, also when it has a stride.

    zero starts weight and bias at 0 (a block that begins as the identity).
    kernel_init: how the weight starts instead of as PyTorch's; the bias then starts at 0.
    """
    uniform = torch_uniform(in_channels * math.prod(kernel_size))
    zeros = nn.initializers.zeros
    return nn.Conv(
        features,
        kernel_size,
        strides=stride,
        padding=[(size // 2, size // 2) for size in kernel_size],
        kernel_init=zeros if zero else kernel_init or uniform,
        bias_init=zeros if zero or kernel_init is not None else uniform,
        conv_general_dilated=_placed(convolve),
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def dense(
    in_features: int,
    features: int,
    *,
    use_bias: bool = True,
    zero: bool = False,
    kernel_init: nn.initializers.Initializer | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Dense:
    """Make a dense layer over the last axis; zero starts weight and bias at 0.

    kernel_init: how the weight starts instead of as PyTorch's; the bias then starts at 0.
    """
    uniform = torch_uniform(in_features)
    zeros = nn.initializers.zeros
    return nn.Dense(
        features,
        use_bias=use_bias,
        dot_general=_placed(jax.lax.dot_general),
        kernel_init=zeros if zero else kernel_init or uniform,
        bias_init=zeros if zero or kernel_init is not None else uniform,
        dtype=dtype,
        param_dtype=param_dtype,
        name=name,
    )


def _placed(product: Callable[..., Array]) -> Callable[..., Array]:
    """Name what a product gives, for remat, and keep it and what it is given with its samples."""

    def of(x: Array, *args: Any, **kwargs: Any) -> Array:
        return checkpoint_name(by_sample(product(by_sample(x), *args, **kwargs)), PRODUCT)

    return of


class GroupNorm(Dtypes, nn.Module):
    """GroupNorm in float32, optionally modulated per sample, h (1 + scale) + shift, then SiLU.

    x [b ... c], scale and shift [b c] -> [b ... c] of dtype. Raises ValueError when the groups do
    not divide the channels. Source: guided-diffusion, GroupNorm32.
    """

    num_groups: int = 32
    epsilon: float = 1e-5
    silu: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *hw c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b *hw c"]:
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(
                f"num_groups = {self.num_groups} does not divide the {channels} channels of "
                f"{'/'.join(self.path)}; choose channels that are a multiple of it"
            )
        gamma = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        beta = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        per_sample = (x.shape[0], channels)
        gain = jnp.broadcast_to(gamma.astype(jnp.float32), per_sample)
        bias = jnp.broadcast_to(beta.astype(jnp.float32), per_sample)
        if scale is not None:
            gain, bias = (a * (1.0 + scale.astype(jnp.float32)) for a in (gain, bias))
        if shift is not None:
            bias = bias + shift.astype(jnp.float32)
        return group_norm(
            x,
            gain,
            bias,
            num_groups=self.num_groups,
            epsilon=self.epsilon,
            silu=self.silu,
            dtype=self.dtype,
        )


class LayerNorm(Dtypes, nn.Module):
    """LayerNorm in float32, epsilon 1e-5 as PyTorch's: x [... c] -> [... c] of dtype."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        shape = (x.shape[-1],)
        gain = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        gain, bias = gain.astype(jnp.float32), bias.astype(jnp.float32)
        return layer_norm(x, gain, bias, self.epsilon).astype(self.dtype)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Double height and width by repeating each pixel."""
    return repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Halve height and width by averaging blocks of 2 x 2."""
    return nn.avg_pool(x, (2, 2), (2, 2))


class Upsample(Dtypes, nn.Module):
    """Repeat each pixel 2 x 2, then convolve (`conv`) if use_conv: [b h w c] -> [b 2h 2w c']."""

    features: int
    use_conv: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        h = upsample_nearest(x)
        if not self.use_conv:
            return h
        return conv(
            x.shape[-1],
            self.features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )(h)


class Downsample(Dtypes, nn.Module):
    """Convolve with stride 2 (`op`), or average 2 x 2 pixels: [b h w c] -> [b h/2 w/2 c']."""

    features: int
    use_conv: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        if not self.use_conv:
            return average_pool(x)
        return conv(
            x.shape[-1],
            self.features,
            stride=2,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="op",
        )(x)


def timestep_embedding(
    t: Num[Array, "b"], dim: int, *, max_period: float = 10000.0
) -> Float[Array, "b d"]:
    """Embed timesteps as [cos(t w_i), sin(t w_i)], w_i = max_period^(-i / (dim // 2)), float32.

    t [b] may be fractional; an odd dim ends in a 0. Source: guided-diffusion, nn.timestep_embedding
    (cosine first, unlike Vaswani et al. 2017).
    """
    half = dim // 2
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def guidance_embedding(scale: Num[Array, "b"], dim: int) -> Float[Array, "b d"]:
    """Embed scales of guidance as [sin(w u_i), cos(w u_i)], w = 1000 (scale - 1), float32.

    u_i = 10000^(-i / (dim // 2 - 1)), so that the last one is 1 / 10000; an odd dim ends in a 0.
    Source: Luo et al. 2023 (LCM), section 4.1 for w; latent-consistency-model for the embedding,
    which differs from `timestep_embedding` in the order and in the last frequency.
    """
    half = dim // 2
    powers = np.arange(half) / max(half - 1, 1)
    frequencies = np.exp(-math.log(10000.0) * powers).astype(np.float32)
    angles = 1000.0 * (scale.astype(jnp.float32) - 1.0)[:, None] * frequencies[None, :]
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def rematerialised(module: type[nn.Module], remat: bool | str, **kwargs: Any) -> type[nn.Module]:
    """Wrap a module class so that its backward pass computes the activations again, to save memory.

    remat: a name of REMAT_POLICIES for what is kept; False is "none" and True "full". Neither the
    numbers nor the parameter names change.
    Raises ValueError for another name.
    """
    if remat in (False, "none"):
        return module
    if remat in (True, "full"):
        return nn.remat(module, **kwargs)
    if remat not in REMAT_POLICIES:
        raise ValueError(
            f"remat = {remat!r} is unknown; "
            f"choose True, False or one of {', '.join(REMAT_POLICIES)}"
        )
    return nn.remat(module, policy=_policy(str(remat)), **kwargs)


def _policy(remat: str) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    if remat == "dots":
        return policies.save_only_these_names(PRODUCT, FLASH)
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT, FLASH],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return getattr(policies, remat)
