"""The table of parameters that a run starts with."""

import flax.linen as nn
from clu import parameter_overview

from diffusion_jax.types import PyTree


def overview(params: PyTree) -> str:
    """List every parameter with its shape, dtype and size, and their number in all.

    params: arrays, or the jax.ShapeDtypeStruct of them; boxes with partitioning names are opened.
    """
    return parameter_overview.get_parameter_overview(nn.unbox(params), include_stats=False)
