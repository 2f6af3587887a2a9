"""One number per array that changes when its values or their order do, whatever its sharding.

Orbax restores flipped bits without a word; a checkpoint therefore carries these numbers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.types import PyTree

# 1: linear modulo 2^32, so that some changes cancel (equal halves swapped, ones for zeros); only
# for checkpoints that have it. 2: every value is mixed with its position.
VERSIONS = (1, 2)
# NumPy works on so many values at once, which stay in the processor's cache.
_BLOCK = 1 << 15


def checksums(tree: PyTree, *, version: int = VERSIONS[-1]) -> dict[str, int]:
    """Sum mix(mix(position) ^ bits) over each array, modulo 2^32 -> {"params/a/kernel": 123, ...}.

    The order of a sum is free, so the result is the same for every sharding. Accelerators compute
    it themselves (one small program per shape), NumPy does it for what lies in host memory; both
    give the same numbers.

    Args:
        tree: arrays of up to 64 bits a value.
        version: 1 for the formula of older checkpoints, sum of (2 * 1640531527 * position + 1) *
            bits.
    """
    sums = {name: _checksum(leaf, version) for name, leaf in named_leaves(tree).items()}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def path_name(path: tuple) -> str:
    """Name a leaf the way checkpoints do: keys, fields and indices joined by '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    """List the leaves of a tree by the names that checkpoints give them, after a prefix."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {prefix + path_name(path): leaf for path, leaf in leaves}


def _term(bits: Any, position: Any, version: int) -> Any:
    """Compute what one value adds to the sum, from uint32 arrays of NumPy or JAX."""
    if version == 1:
        return bits * (position * np.uint32(2 * 1640531527) + np.uint32(1))
    return _mix(_mix(position + np.uint32(0x9E3779B9)) ^ bits)


def _mix(x: Any) -> Any:
    """Spread each bit of uint32 over all others (the last step of MurmurHash3, a bijection)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _checksum(leaf: jax.Array | np.ndarray | np.generic, version: int) -> jax.Array | np.uint32:
    if not isinstance(leaf, jax.Array):
        return _of_part(np.asarray(leaf), (slice(None),) * np.ndim(leaf), np.shape(leaf), version)
    on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    if not (on_cpu and leaf.is_fully_addressable):
        return _on_devices(leaf, version)
    parts = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    sums = [_of_part(np.asarray(p.data), p.index, leaf.shape, version) for p in parts]
    return np.sum(np.asarray(sums, np.uint32), dtype=np.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _on_devices(leaf: jax.Array, version: int) -> jax.Array:
    bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    # a value of 64 bits becomes two, on a new last axis
    word = jnp.dtype(f"uint{min(8 * bits.dtype.itemsize, 32)}")
    bits = jax.lax.bitcast_convert_type(bits, word).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(bits.shape)):
        position = position + stride * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_term(bits, position, version), dtype=jnp.uint32)


def _of_part(
    part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...], version: int
) -> np.uint32:
    """Sum over a part of an array of this shape that lies at index."""
    word = np.dtype(f"uint{min(8 * part.dtype.itemsize, 32)}")
    if part.dtype.itemsize == 8:
        part, index, shape = part[..., None], (*index, slice(None)), (*shape, 2)
    elif part.ndim == 0:
        part, index, shape = part[None], (slice(None),), (1,)
    bits = np.ascontiguousarray(part).view(word)
    starts = np.zeros(1, np.uint32)  # the positions of rows, which are along the last axis
    for axis, (along, stride) in enumerate(zip(index, _strides(shape), strict=True)):
        steps = np.arange(bits.shape[axis], dtype=np.uint32) + np.uint32(along.start or 0)
        if axis + 1 < bits.ndim:
            starts = (starts[:, None] + steps * stride).ravel()
    rows = bits.reshape(len(starts), bits.shape[-1])
    height = max(1, _BLOCK // max(1, rows.shape[1]))
    sums = np.zeros(-(-len(rows) // height), np.uint32)
    for i in range(len(sums)):
        here = slice(i * height, (i + 1) * height)
        words, position = rows[here].astype(np.uint32), starts[here, None] + steps
        sums[i] = np.sum(_term(words, position, version), dtype=np.uint32)
    return np.sum(sums, dtype=np.uint32)


def _strides(shape: tuple[int, ...]) -> list[np.uint32]:
    sizes = [int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape))]
    return [np.uint32(size % 2**32) for size in sizes]
