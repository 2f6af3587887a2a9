"""Resampling of images as PyTorch does it, as one matrix for each axis."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.models.layers.basic import torch_uniform
from diffusion_jax.models.layers.dtypes import Dtypes

METHODS = ("nearest", "bilinear", "bicubic", "area")
_CUBIC_A = -0.75  # PyTorch's cubic kernel; Keys 1981 and jax.image have -0.5


def interpolation_matrix(
    size_in: int,
    size_out: int,
    method: str,
    *,
    factor: float | None = None,
    align_corners: bool = False,
) -> np.ndarray:
    """Build the matrix [size_out, size_in] of torch.nn.functional.interpolate along one axis.

    Output i reads around (i + 1/2) / factor - 1/2 with factor = size_out / size_in, or the factor
    that was given (PyTorch's scale_factor); with align_corners around i (size_in - 1) / (size_out -
    1). No antialiasing, except that "area" is the mean over adaptive blocks. float32, computed in
    float64. Raises ValueError for a method that METHODS does not have.
    Source: PyTorch, aten/src/ATen/native/UpSample.h and AdaptiveAveragePooling.cpp.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r} is unknown; choose one of {', '.join(METHODS)}")
    i = np.arange(size_out)
    step = size_in / size_out if factor is None else 1.0 / factor
    if method == "area":
        starts, ends = (i * size_in) // size_out, -((-(i + 1) * size_in) // size_out)
        inside = (np.arange(size_in) >= starts[:, None]) & (np.arange(size_in) < ends[:, None])
        return (inside / (ends - starts)[:, None]).astype(np.float32)
    if method == "nearest":
        return _taps(size_in, np.floor(i * step)[:, None], np.ones((size_out, 1)))
    if align_corners:
        source = i * ((size_in - 1) / max(size_out - 1, 1))
    else:
        source = (i + 0.5) * step - 0.5
    first = np.floor(source)
    offsets = np.arange(2) if method == "bilinear" else np.arange(-1, 3)
    distances = np.abs((source - first)[:, None] - offsets)
    weights = 1.0 - distances if method == "bilinear" else _cubic(distances)
    return _taps(size_in, first[:, None] + offsets, weights)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Weigh pixels by the cubic convolution kernel. Source: Keys 1981, equation 15."""
    a, d = _CUBIC_A, distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _taps(size_in: int, columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Put weights [n k] into the columns [n k] of a matrix; columns outside fold to the border."""
    matrix = np.zeros((columns.shape[0], size_in))
    rows = np.broadcast_to(np.arange(columns.shape[0])[:, None], columns.shape)
    np.add.at(matrix, (rows, np.clip(columns, 0, size_in - 1).astype(int)), weights)
    return matrix.astype(np.float32)


def resample(
    x: Float[Array, "b h w c"], rows: np.ndarray, columns: np.ndarray
) -> Float[Array, "b h2 w2 c"]:
    """Apply a matrix [h2 h] to the rows and one [w2 w] to the columns, in float32."""
    highest = jax.lax.Precision.HIGHEST
    h = x.astype(jnp.float32)
    h = jnp.einsum("bhwc,ph->bpwc", h, jnp.asarray(rows), precision=highest)
    return jnp.einsum("bpwc,qw->bpqc", h, jnp.asarray(columns), precision=highest)


class SpatialRescaler(Dtypes, nn.Module):
    """Rescale an image n_stages times, then map its channels: [b h w c] -> [b h' w' c'].

    Every stage leaves floor(size * multiplier) pixels. out_channels adds a 1 x 1 convolution
    (`channel_mapper`). Nothing is antialiased: "bilinear" by 0.5 is the mean over 2 x 2 pixels.
    Raises ValueError for an unknown method, other channels than in_channels, or an empty result.
    Source: latent-diffusion and generative-models, SpatialRescaler.
    """

    n_stages: int = 1
    method: str = "bilinear"
    multiplier: float = 0.5
    in_channels: int = 3
    out_channels: int | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        if x.shape[-1] != self.in_channels:
            raise ValueError(
                f"SpatialRescaler got {x.shape[-1]} channels and has "
                f"in_channels = {self.in_channels}"
            )
        h = x
        for _ in range(self.n_stages):
            sizes = [math.floor(size * self.multiplier) for size in h.shape[1:3]]
            if min(sizes) < 1:
                raise ValueError(
                    f"n_stages = {self.n_stages} with multiplier = {self.multiplier} leave "
                    f"nothing of {x.shape[1]} x {x.shape[2]} pixels"
                )
            rows, columns = (
                interpolation_matrix(size_in, size_out, self.method, factor=self.multiplier)
                for size_in, size_out in zip(h.shape[1:3], sizes, strict=True)
            )
            h = resample(h, rows, columns)
        h = h.astype(self.dtype)
        if self.out_channels is None:
            return h
        uniform = torch_uniform(self.in_channels)
        return nn.Conv(
            self.out_channels,
            (1, 1),
            use_bias=self.bias,
            kernel_init=uniform,
            bias_init=uniform,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="channel_mapper",
        )(h)


class LowResolution(nn.Module):
    """A blurred copy of an image, as if it had been enlarged from 1 / factor of its sides."""

    factor: int

    @nn.compact
    def __call__(self, image: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Average blocks of factor x factor pixels and interpolate back: [b h w c] -> the same."""
        blocks = (self.factor, self.factor)
        small = nn.avg_pool(image, blocks, strides=blocks)
        return jax.image.resize(small, image.shape, "cubic")
