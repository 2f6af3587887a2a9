"""The blend of what frames are alone and what they are in their clip."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

STRATEGIES = ("fixed", "learned", "learned_with_images")


class AlphaBlender(nn.Module):
    """Compute alpha, with which `blend` blends: image_only_indicator [*i] -> [*i] or [1], float32.

    merge_strategy: "fixed", alpha is merge_factor, and there is no parameter. "learned": alpha is
      the sigmoid of mix_factor, which starts as merge_factor. "learned_with_images": the same, but
      1 where image_only_indicator is not 0, so that images skip what is temporal.

    Raises ValueError for another merge_strategy.
    Source: generative-models, diffusionmodules.util.AlphaBlender.
    """

    merge_strategy: str = "learned_with_images"
    merge_factor: float = 0.5
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image_only_indicator: Num[Array, "*i"]) -> Float[Array, "..."]:
        check_strategy(self.merge_strategy)
        if self.merge_strategy == "fixed":
            return jnp.full((1,), self.merge_factor, jnp.float32)
        start = nn.initializers.constant(self.merge_factor)
        mix_factor = self.param("mix_factor", start, (1,), self.param_dtype)
        alpha = nn.sigmoid(mix_factor.astype(jnp.float32))
        if self.merge_strategy == "learned":
            return alpha
        return jnp.where(image_only_indicator != 0, 1.0, alpha[0])


def check_strategy(merge_strategy: str, name: str = "merge_strategy") -> None:
    """Raise ValueError for a strategy of an AlphaBlender that there is not; name: of the field."""
    if merge_strategy not in STRATEGIES:
        raise ValueError(
            f"{name} = {merge_strategy!r} is unknown; choose from {', '.join(STRATEGIES)}"
        )


def blend(
    alpha: Float[Array, "..."], spatial: Float[Array, "..."], temporal: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Blend two arrays: alpha spatial + (1 - alpha) temporal, in the dtype of spatial.

    alpha [1] is for all; alpha [*i] has the first axes of the arrays [*i ...].
    """
    alpha = alpha.reshape(*alpha.shape, *(1,) * (spatial.ndim - alpha.ndim))
    rest = (1.0 - alpha).astype(spatial.dtype)
    return alpha.astype(spatial.dtype) * spatial + rest * temporal
