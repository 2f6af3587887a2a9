"""The residual block of the UNets: two convolutions, modulated by the timestep embedding."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.models.layers.basic import GroupNorm, average_pool, conv, dense, upsample_nearest


class ResBlock(nn.Module):
    """Residual block: skip(x) + conv(dropout(silu(norm(conv(silu(norm(x))), emb)))).

    x [b h w c], emb [b e] -> [b h w out_channels], with doubled or halved sides for up or down. The
    embedding is added before the second norm, or with use_scale_shift_norm modulates it:
    norm(h) (1 + scale) + shift. The last convolution starts at 0. A dropout above 0 draws from the
    rng "dropout". Source: guided-diffusion, unet.ResBlock.
    """

    out_channels: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    up: bool = False
    down: bool = False
    num_groups: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]
    ) -> Float[Array, "b h2 w2 o"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        features = self.out_channels
        h = GroupNorm(self.num_groups, silu=True, name="in_layers_0", **dtypes)(x)
        if self.up:
            h, x = upsample_nearest(h), upsample_nearest(x)
        elif self.down:
            h, x = average_pool(h), average_pool(x)
        h = conv(x.shape[-1], features, name="in_layers_2", **dtypes)(h)

        width = 2 * features if self.use_scale_shift_norm else features
        emb = dense(emb.shape[-1], width, name="emb_layers_1", **dtypes)(nn.silu(emb))
        norm = GroupNorm(self.num_groups, silu=True, name="out_layers_0", **dtypes)
        if self.use_scale_shift_norm:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h, scale, shift)
        else:
            h = norm(h + emb[:, None, None, :])
        h = nn.Dropout(self.dropout, deterministic=False)(h)
        h = conv(features, features, zero=True, name="out_layers_3", **dtypes)(h)

        if x.shape[-1] != features:
            x = conv(x.shape[-1], features, (1, 1), name="skip_connection", **dtypes)(x)
        return x + h
