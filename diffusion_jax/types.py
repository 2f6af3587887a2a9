"""Vocabulary of the package: array aliases with named axes, and callables between modules.

Axis letters: b batch, h height, w width, c channels, l sequence length, d feature width, t time
(video) or timestep.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jaxtyping import Array, Float, Int, Key

PyTree: TypeAlias = Any
Image: TypeAlias = Float[Array, "b h w c"]
PerSample: TypeAlias = Float[Array, "b"]
Timesteps: TypeAlias = Int[Array, "b"]
Keys: TypeAlias = Key[Array, "b"]

# Conditioning holds what a network may see, by where it enters: "crossattn" [b l d], "vector" ([b
# d] features or int [b] labels), "concat" [b h w c']; of videos each may have an axis t after b,
# and "image_only_indicator" [b t] is 1 where frames are independent images.
Conditioning: TypeAlias = Mapping[str, Array]
Batch: TypeAlias = Mapping[str, Array]
# More entries of a Conditioning, numbers [b] for networks with an option that reads them: the scale
# of guidance that a distilled network imitates, and how far the step of a mean-flow network goes.
GUIDANCE, DURATION = "guidance", "duration"

# A network with its conditioning and guidance already bound: (x_t [b h w c] or [b t h w c], t [b])
# -> model output.
Predict: TypeAlias = Callable[[Array, Array], Array]
