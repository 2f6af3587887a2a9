"""EfficientNet-Lite0 up to its pooled features: [b h w 3] -> [b 1280].

Parameters are {"stem": layer, "blocks": [{"expand", "depthwise", "project"}], "head": layer}.
Source: Tan and Le 2019 (EfficientNet); TensorFlow's EfficientNet-Lite without squeeze-excitation.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.models.features.layers import conv, depthwise, folded, resize
from diffusion_jax.types import PyTree

NAME, WIDTH, SIZE = "efficientnet_lite0", 1280, 224


class Stage(NamedTuple):
    """Blocks of equal width: kernel size, stride of the first one, expansion, channels, number."""

    size: int
    stride: int
    expansion: int
    features: int
    count: int


STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


def features(params: PyTree, images: Float[Array, "b h w 3"]) -> Float[Array, "b 1280"]:
    """Compute the pooled features of images with values in [0, 255]."""
    return jnp.mean(last_activations(params, images), (1, 2))


def last_activations(params: PyTree, images: Float[Array, "b h w 3"]) -> Float[Array, "b p q d"]:
    """Compute the activations before pooling."""
    x = (resize(images, SIZE, "bilinear") - 127.0) / 128.0
    x = _relu6(conv(x, params["stem"], stride=2))
    for block, stride in zip(params["blocks"], strides(), strict=True):
        h = _relu6(conv(x, block["expand"])) if "expand" in block else x
        h = _relu6(depthwise(h, block["depthwise"], stride=stride))
        h = conv(h, block["project"])
        x = x + h if h.shape == x.shape else h
    return _relu6(conv(x, params["head"]))


def strides() -> list[int]:
    """List the stride of each block."""
    return [stage.stride if i == 0 else 1 for stage in STAGES for i in range(stage.count)]


def from_tensors(tensor: Callable[[str], np.ndarray]) -> PyTree:
    """Build the parameters from tensors by the names of EfficientNet-PyTorch.

    tensor: name -> array; it raises where there is none.
    """

    def layer(name: str, norm: str) -> Mapping[str, np.ndarray]:
        kernel = tensor(f"{name}.weight").transpose(2, 3, 1, 0)
        stored = (tensor(f"{norm}.{part}") for part in ("running_mean", "running_var", "bias"))
        return folded(kernel, *stored, scale=tensor(f"{norm}.weight"))

    def block(i: int, expansion: int) -> dict[str, Mapping[str, np.ndarray]]:
        names = {"depthwise": "_bn1", "project": "_bn2"}
        names = names if expansion == 1 else {"expand": "_bn0", **names}
        at = f"_blocks.{i}."
        return {name: layer(f"{at}_{name}_conv", at + norm) for name, norm in names.items()}

    expansions = [stage.expansion for stage in STAGES for _ in range(stage.count)]
    return {
        "stem": layer("_conv_stem", "_bn0"),
        "blocks": [block(i, expansion) for i, expansion in enumerate(expansions)],
        "head": layer("_conv_head", "_bn1"),
    }


def _relu6(x: Array) -> Array:
    return jnp.clip(x, 0.0, 6.0)
