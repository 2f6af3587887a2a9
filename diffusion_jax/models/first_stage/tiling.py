"""Encode and decode what does not fit into memory at once: in overlapping tiles, or in chunks.

Videos are decoded in chunks of frames that overlap, by the same blending along one axis.

A tile is seen on its own: the networks' GroupNorm and middle attention then know the tile and not
the whole image, so colours and contrast may differ slightly between tiles, and the result differs
from the untiled one. What is returned has no seam, because neighbours are blended linearly where
they overlap. A network of convolutions alone gives the untiled result, to rounding, when `margin`
covers the reach of its kernels. Images of one tile are passed through unchanged.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.types import PyTree

Network = Callable[[Array], Array]


class Axis(NamedTuple):
    """Tiles along one side, in latent pixels: where they start, and their length."""

    starts: tuple[int, ...]
    length: int


def tiled_decode(
    decode: Network,
    z: Float[Array, "b h w d"],
    *,
    factor: int = 8,
    tile: int = 64,
    overlap: int = 16,
    margin: int = 4,
) -> Float[Array, "b h2 w2 c"]:
    """Decode z [b h w d] -> [b factor*h factor*w c], one tile of the latent at a time.

    decode: [b tile tile d] -> [b factor*tile factor*tile c]. tile, overlap and margin count latent
    pixels: neighbours share at least `overlap`. Each throws away its outer `margin` there (where a
    convolution saw padding instead of the neighbour), and the rest is blended linearly.
    Compiles decode once and holds the activations of one tile (of all b samples; see in_chunks).
    Raises ValueError unless 0 <= 2 margin < overlap < tile.
    """
    return _tiled(decode, z, (1, factor), tile, overlap, margin)


def tiled_encode(
    encode: Network,
    image: Float[Array, "b h w c"],
    *,
    factor: int = 8,
    tile: int = 64,
    overlap: int = 16,
    margin: int = 4,
) -> Float[Array, "b h2 w2 m"]:
    """Encode image [b h w c] -> moments [b h/factor w/factor m], one tile at a time.

    Blends moments as `tiled_decode` blends images; tile, overlap and margin count latent pixels as
    well. Raises ValueError too when factor does not divide the sides.
    """
    height, width = image.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(
            f"the image is {height} x {width} pixels; both should be multiples of {factor}"
        )
    return _tiled(encode, image, (factor, 1), tile, overlap, margin)


def decode_in_clips(
    decode: Network, z: Float[Array, "b t h w d"], *, frames: int, overlap: int, margin: int = 0
) -> Float[Array, "b t h2 w2 c"]:
    """Decode z [b t h w d] -> [b t H W c], so many frames of the clip at a time.

    decode: [b frames h w d] -> [b frames H W c]. Chunks share at least `overlap` frames. Each
    throws away its outer `margin` there, and the rest is blended linearly, so that no seam is seen.
    Compiles decode once and holds the activations of one chunk.
    Raises ValueError unless 0 <= 2 margin < overlap < frames.
    """
    if not 0 <= 2 * margin < overlap < frames:
        raise ValueError(
            f"frames = {frames}, overlap = {overlap}, margin = {margin}: "
            "should be 0 <= 2 margin < overlap < frames"
        )
    axis = tile_axis(z.shape[1], tile=frames, overlap=overlap)
    if len(axis.starts) == 1:
        return decode(z)
    weights = blend_weights(axis, overlap=overlap, margin=margin)

    def add(total: Array, place: tuple[Array, Array]) -> tuple[Array, None]:
        start, weight = place
        y = decode(jax.lax.dynamic_slice_in_dim(z, start, axis.length, axis=1))
        y = weight[None, :, None, None, None] * y.astype(jnp.float32)
        before = jax.lax.dynamic_slice_in_dim(total, start, axis.length, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, before + y, start, axis=1), None

    chunk = jax.ShapeDtypeStruct((z.shape[0], axis.length, *z.shape[2:]), z.dtype)
    result = jax.eval_shape(decode, chunk)
    total = jnp.zeros((*z.shape[:2], *result.shape[2:]), jnp.float32)
    total, _ = jax.lax.scan(add, total, (jnp.asarray(axis.starts), jnp.asarray(weights)))
    return total.astype(result.dtype)


def in_chunks(function: Callable[[PyTree], PyTree], x: PyTree, *, chunk_size: int) -> PyTree:
    """Apply a function of a batch to chunk_size samples at a time, one chunk after the other.

    x: a pytree of arrays [b ...], say of a latent and its keys; the function returns a pytree of
    arrays [b ...] that depend on their own sample only. The last chunk may be smaller. Chunk i of
    k holds samples i, i + k, ..., so that each takes some of every device's samples.
    Raises ValueError for a chunk_size below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size} should be at least 1")
    batch = jax.tree.leaves(x)[0].shape[0]
    if batch <= chunk_size:
        return function(x)
    count, rest = divmod(batch, chunk_size)

    def split(a: Array) -> Array:
        return jnp.swapaxes(a[: batch - rest].reshape(chunk_size, count, *a.shape[1:]), 0, 1)

    def join(a: Array) -> Array:
        return jnp.swapaxes(a, 0, 1).reshape(batch - rest, *a.shape[2:])

    whole = jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, x)))
    if not rest:
        return whole
    last = function(jax.tree.map(lambda a: a[batch - rest :], x))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), whole, last)


def tile_axis(size: int, *, tile: int, overlap: int) -> Axis:
    """Spread the fewest tiles evenly over `size` latent pixels, sharing at least `overlap` each."""
    if size <= tile:
        return Axis((0,), size)
    count = math.ceil((size - overlap) / (tile - overlap))
    steps = np.linspace(0.0, size - tile, count)
    return Axis(tuple(int(start) for start in np.floor(steps + 0.5)), tile)


def blend_weights(
    axis: Axis, *, overlap: int, margin: int, scale: int = 1
) -> Float[np.ndarray, "n p"]:
    """Weigh the pixels of each tile along one side, scale pixels per latent pixel, in float32.

    0 in the outer margin, then a linear ramp to 1, but for the sides of the image; divided so that
    the weights of all tiles sum to 1 at each pixel.
    """
    starts, length = axis
    place = (np.arange(length * scale) + 0.5) / scale
    ramp = overlap - 2 * margin
    rise = np.clip((place - margin) / ramp, 0.0, 1.0)
    weights = np.ones((len(starts), length * scale))
    weights[1:] *= rise
    weights[:-1] *= rise[::-1]
    total = np.zeros((starts[-1] + length) * scale)
    windows = [slice(start * scale, (start + length) * scale) for start in starts]
    for window, row in zip(windows, weights, strict=True):
        total[window] += row
    shares = [row / total[window] for window, row in zip(windows, weights, strict=True)]
    return np.stack(shares).astype(np.float32)


def _tiled(
    network: Network, x: Array, per_latent: tuple[int, int], tile: int, overlap: int, margin: int
) -> Array:
    """Sum the weighed outputs of all tiles; per_latent: pixels of input and output per latent."""
    if not 0 <= 2 * margin < overlap < tile:
        raise ValueError(
            f"tile = {tile}, overlap = {overlap}, margin = {margin}: "
            "should be 0 <= 2 margin < overlap < tile"
        )
    into, out = per_latent
    rows, columns = (
        tile_axis(side // into, tile=tile, overlap=overlap) for side in (x.shape[1], x.shape[2])
    )
    if len(rows.starts) == len(columns.starts) == 1:
        return network(x)
    weigh = partial(blend_weights, overlap=overlap, margin=margin, scale=out)
    row_weights, column_weights = jnp.asarray(weigh(rows)), jnp.asarray(weigh(columns))
    row_starts, column_starts = jnp.asarray(rows.starts), jnp.asarray(columns.starts)

    size = (x.shape[0], rows.length * into, columns.length * into, x.shape[3])

    def add(total: Array, place: tuple[Array, Array]) -> tuple[Array, None]:
        row, column = place
        top, left = row_starts[row], column_starts[column]
        y = network(jax.lax.dynamic_slice(x, (0, top * into, left * into, 0), size))
        weights = row_weights[row][:, None] * column_weights[column][None, :]
        corner = (0, top * out, left * out, 0)
        before = jax.lax.dynamic_slice(total, corner, y.shape)
        after = before + weights[None, :, :, None] * y.astype(jnp.float32)
        return jax.lax.dynamic_update_slice(total, after, corner), None

    result = jax.eval_shape(network, jax.ShapeDtypeStruct(size, x.dtype))
    shape = (x.shape[0], x.shape[1] // into * out, x.shape[2] // into * out, result.shape[3])
    places = np.mgrid[: len(rows.starts), : len(columns.starts)].reshape(2, -1)
    each = jnp.asarray(places[0]), jnp.asarray(places[1])
    total, _ = jax.lax.scan(add, jnp.zeros(shape, jnp.float32), each)
    return total.astype(result.dtype)
