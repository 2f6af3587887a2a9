"""Layers of frozen feature networks: convolutions that hold their batch norm, resizing, cubics.

A layer is {"kernel": [... c o], "bias": [o]}; the batch norm behind a convolution is folded into
it once, in float64, because these networks are never trained.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Layer = Mapping[str, Any]
_AXES = {4: ("NHWC", "HWIO", "NHWC"), 5: ("NDHWC", "DHWIO", "NDHWC")}


def conv(
    x: Float[Array, "b *space c"],
    layer: Layer,
    *,
    stride: int | Sequence[int] = 1,
    padding: Any = "SAME",
) -> Float[Array, "b *out o"]:
    """Convolve images [b h w c] or videos [b t h w c]; "SAME" pads as TensorFlow does."""
    rank = x.ndim - 2
    strides = (stride,) * rank if isinstance(stride, int) else tuple(stride)
    y = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        strides,
        padding,
        dimension_numbers=_AXES[x.ndim],
    )
    return y + layer["bias"].reshape((1,) * (rank + 1) + (-1,))


def depthwise(x: Float[Array, "b h w c"], layer: Layer, *, stride: int) -> Float[Array, "b p q c"]:
    """Convolve each channel with a kernel of its own, [k k 1 c]; padded as TensorFlow does.

    It is written as a sum of shifted images: XLA's grouped convolution is far slower on a CPU.
    """
    size = layer["kernel"].shape[0]
    new = [-(-n // stride) for n in x.shape[1:3]]
    total = [max((m - 1) * stride + size - n, 0) for m, n in zip(new, x.shape[1:3], strict=True)]
    around = [(t // 2, t - t // 2) for t in total]
    x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    ends = [(m - 1) * stride + 1 for m in new]
    y = jnp.asarray(layer["bias"]).reshape(1, 1, 1, -1)
    for i, j in itertools.product(range(size), repeat=2):
        shifted = x[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
        y = y + shifted * layer["kernel"][i, j, 0][None, None, None]
    return y


def folded(
    kernel: np.ndarray, mean: Any, var: Any, bias: Any, *, scale: Any = 1.0, eps: float = 1e-3
) -> dict[str, np.ndarray]:
    """Fold the batch norm behind a convolution without bias into it; kernel [... c o]."""
    factor = np.asarray(scale, np.float64) / np.sqrt(np.asarray(var, np.float64) + eps)
    shift = np.asarray(bias, np.float64) - np.asarray(mean, np.float64) * factor
    kernel = np.asarray(kernel, np.float64) * factor
    return {"kernel": kernel.astype(np.float32), "bias": shift.astype(np.float32)}


def resize(
    images: Float[Array, "b h w c"], size: int, method: str, *, antialias: bool = True
) -> Float[Array, "b size size c"]:
    """Resize images to size x size as PIL does: half-pixel centres, smoothed when made smaller."""
    b, _, _, c = images.shape
    return jax.image.resize(images, (b, size, size, c), method, antialias=antialias)


def resize_tf1(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b size size c"]:
    """Resize bilinearly as TensorFlow 1 did: pixel i of the result lies at i * h / size.

    The corners of pixels are aligned, not their centres, and nothing is smoothed.
    Source: tf.image.resize_bilinear with align_corners=False.
    """
    rows, columns = (jnp.asarray(_tf1_matrix(n, size)) for n in images.shape[1:3])
    return jnp.einsum(
        "ph,qw,bhwc->bpqc", rows, columns, images, precision=jax.lax.Precision.HIGHEST
    )


def _tf1_matrix(old: int, new: int) -> np.ndarray:
    """Build the weights [new, old] of resize_tf1 along one axis."""
    scale = np.float32(old) / np.float32(new)
    places = np.arange(new, dtype=np.float32) * scale
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, old - 1)
    share = places - low
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (np.arange(new), low), 1.0 - share)
    np.add.at(weights, (np.arange(new), high), share)
    return weights


def cubic_matrix(old: int, new: int, *, a: float = -0.75) -> np.ndarray:
    """Build the weights [new, old] of PyTorch's bicubic interpolation along one axis.

    Half-pixel centres, edges repeated, nothing smoothed. Source: Keys 1981, equation 15.
    """
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int) - 1
    weights = np.zeros((new, old))
    for k in range(4):
        d = np.abs(places - (first + k))
        near = ((a + 2) * d - (a + 3)) * d**2 + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        value = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
        np.add.at(weights, (np.arange(new), np.clip(first + k, 0, old - 1)), value)
    return weights
