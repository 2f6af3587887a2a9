"""The table of parameters that is written when a run starts."""

import flax.linen as nn
from clu import parameter_overview

from diffusion_jax.types import PyTree


def overview(params: PyTree) -> str:
    """List every parameter with its shape, dtype and size, and their number in all.

    params: arrays or jax.ShapeDtypeStruct, also in Flax's boxes with partitioning names.
    """
    return parameter_overview.get_parameter_overview(nn.unbox(params), include_stats=False)
