"""An autoencoder of images as the start of one of videos, whose decoder reads the latent itself."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array

from diffusion_jax.types import PyTree


def inflated(params: Mapping[str, PyTree], *, use_quant_conv: bool) -> dict[str, PyTree]:
    """Name the parameters of an autoencoder as a VideoAutoencoder names them.

    Layers over time are not added: new ones change nothing (see VideoDecoder). The 1 x 1
    convolutions around the latent become a part of the 3 x 3 convolutions beside them, quant_conv
    only without use_quant_conv. At the border of the latent, where a 3 x 3 convolution sees zeros,
    a post_quant_conv with a bias is not reproduced exactly.
    """
    found = dict(params)
    if "quant_conv" in found and not use_quant_conv:
        matrix, shift = _pointwise(found.pop("quant_conv"))
        kernel, bias = _last(found["encoder"], "conv_out")
        folded = (kernel @ matrix, bias @ matrix + shift)
        found["encoder"] = _with(found["encoder"], "conv_out", *folded)
    if "post_quant_conv" in found:
        matrix, shift = _pointwise(found.pop("post_quant_conv"))
        kernel, bias = _last(found["decoder"], "conv_in")
        folded = (matrix @ kernel, bias + np.einsum("m,yxmo->o", shift, kernel))
        found["decoder"] = _with(found["decoder"], "conv_in", *folded)
    return found


def with_quant_conv(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Add a quant_conv that changes nothing to an encoder of latents that has none.

    The encoder of a run of videos has none, the network that encodes the first frame has one.
    """
    bias = np.asarray(params["encoder"]["conv_out"]["bias"])
    identity = np.eye(len(bias), dtype=bias.dtype)[None, None]
    return {"quant_conv": {"kernel": identity, "bias": np.zeros_like(bias)}, **params}


def _pointwise(layer: Mapping[str, np.ndarray | Array]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(layer["kernel"], np.float64)[0, 0], np.asarray(layer["bias"], np.float64)


def _last(part: PyTree, name: str) -> tuple[np.ndarray, np.ndarray]:
    layer = part[name]
    return np.asarray(layer["kernel"], np.float64), np.asarray(layer["bias"], np.float64)


def _with(part: PyTree, name: str, kernel: np.ndarray, bias: np.ndarray) -> PyTree:
    own = {"kernel": kernel, "bias": bias}
    own = {leaf: value.astype(np.asarray(part[name][leaf]).dtype) for leaf, value in own.items()}
    return {**part, name: own}
