"""DINOv2, a vision transformer trained without labels: [b h w 3] -> class token [b d].

Parameters are the tensors of Hugging Face's Dinov2Model by their names, as arrays.
Source: Oquab et al. 2023; Dosovitskiy et al. 2020.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.models.features.layers import cubic_matrix, resize
from diffusion_jax.types import PyTree

NAME, SIZE, PATCH, HEAD = "dinov2", 224, 14, 64
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EPS = 1e-6


def features(params: PyTree, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    """Compute the normed class token of images with values in [0, 255]."""
    x = resize(images, SIZE, "bicubic") / 255.0
    mean, std = (jnp.asarray(a, jnp.float32)[None, None, None] for a in (_MEAN, _STD))
    patches = rearrange((x - mean) / std, "b (h p) (w q) c -> b (h w) (p q c)", p=PATCH, q=PATCH)
    x = patches @ params["patch"]["kernel"] + params["patch"]["bias"][None, None]
    token = jnp.broadcast_to(params["token"], (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([token, x], 1) + params["positions"]
    for layer in params["layers"]:
        x = x + _scaled(_attention(layer, _norm(x, layer["norm1"])), layer["layer_scale1"])
        x = x + _scaled(_mlp(layer, _norm(x, layer["norm2"])), layer["layer_scale2"])
    return _norm(x, params["layernorm"])[:, 0]


def from_tensors(tensor: Callable[[str], np.ndarray], names: Iterable[str]) -> PyTree:
    """Build the parameters from tensors by the names of Hugging Face's Dinov2Model.

    tensor: name -> array; it raises where there is none. names: all that there are. The positions
    of a grid for 518 pixels are interpolated to the grid of 224 pixels.
    """
    names = set(names)
    depth = len({name.split(".")[2] for name in names if name.startswith("encoder.layer.")})

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": tensor(f"{name}.weight").T, "bias": tensor(f"{name}.bias")}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensor(f"{name}.weight"), "bias": tensor(f"{name}.bias")}

    def layer(i: int) -> dict[str, Any]:
        at = f"encoder.layer.{i}."
        gated = f"{at}mlp.weights_in.weight" in names
        mlp = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
        parts = {part: linear(f"{at}attention.attention.{part}") for part in _PROJECTIONS}
        return {
            **parts,
            "out": linear(f"{at}attention.output.dense"),
            "norm1": norm(f"{at}norm1"),
            "norm2": norm(f"{at}norm2"),
            "layer_scale1": tensor(f"{at}layer_scale1.lambda1"),
            "layer_scale2": tensor(f"{at}layer_scale2.lambda1"),
            **{part: linear(f"{at}mlp.{part}") for part in mlp},
        }

    patch = tensor("embeddings.patch_embeddings.projection.weight")
    return {
        "patch": {
            "kernel": rearrange(patch, "d c p q -> (p q c) d"),
            "bias": tensor("embeddings.patch_embeddings.projection.bias"),
        },
        "token": tensor("embeddings.cls_token"),
        "positions": _positions(tensor("embeddings.position_embeddings")),
        "layers": [layer(i) for i in range(depth)],
        "layernorm": norm("layernorm"),
    }


_PROJECTIONS = ("query", "key", "value")


def _positions(stored: np.ndarray) -> np.ndarray:
    """Interpolate the positions [1 1+n d] of a square grid to the patches of SIZE pixels."""
    old, new = round((stored.shape[1] - 1) ** 0.5), SIZE // PATCH
    matrix = cubic_matrix(old, new)
    grid = rearrange(stored[0, 1:].astype(np.float64), "(h w) d -> h w d", h=old)
    grid = np.einsum("ph,qw,hwd->pqd", matrix, matrix, grid)
    rows = rearrange(grid, "h w d -> (h w) d")[None]
    return np.concatenate([stored[:, :1], rows], 1).astype(np.float32)


def _attention(layer: Mapping[str, Any], x: Array) -> Array:
    q, k, v = (
        rearrange(_linear(x, layer[name]), "b l (n d) -> b l n d", d=HEAD) for name in _PROJECTIONS
    )
    h = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return _linear(rearrange(h, "b l n d -> b l (n d)"), layer["out"])


def _mlp(layer: Mapping[str, Any], x: Array) -> Array:
    if "weights_in" in layer:
        gate, h = jnp.split(_linear(x, layer["weights_in"]), 2, -1)
        return _linear(jax.nn.silu(gate) * h, layer["weights_out"])
    return _linear(jax.nn.gelu(_linear(x, layer["fc1"]), approximate=False), layer["fc2"])


def _linear(x: Array, layer: Mapping[str, Any]) -> Array:
    return x @ layer["kernel"] + layer["bias"][None, None]


def _norm(x: Array, layer: Mapping[str, Any]) -> Array:
    mean = jnp.mean(x, -1, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    scale, bias = (layer[name][None, None] for name in ("scale", "bias"))
    return (x - mean) * jax.lax.rsqrt(var + _EPS) * scale + bias


def _scaled(x: Array, scale: Array) -> Array:
    return x * scale[None, None]
