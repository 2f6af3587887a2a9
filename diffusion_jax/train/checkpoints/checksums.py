"""One number per array that changes when a bit of it flips, whatever the array's sharding.

Orbax restores flipped bits without a word; a checkpoint therefore carries these numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.types import PyTree

# The weights are odd: a change of one element changes the sum by an odd multiple of it, which is
# never 0 modulo 2^32.
_SPREAD = 2 * 1640531527


def checksums(tree: PyTree) -> dict[str, int]:
    """Sum every leaf's bits, weighted by position, modulo 2^32 -> {"params/a/kernel": 123, ...}.

    On accelerators the devices do it (one small program per shape), on CPU NumPy does, in place;
    both give the same numbers, and so does any sharding. Leaves are arrays of up to 64 bits.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = {path_name(path): _checksum(leaf) for path, leaf in leaves}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def path_name(path: tuple) -> str:
    """Name a leaf the way checkpoints do: keys, fields and indices joined by '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _checksum(leaf: jax.Array | np.ndarray | np.generic) -> jax.Array | np.uint32:
    if not isinstance(leaf, jax.Array):
        return _of_part(np.asarray(leaf), (slice(None),) * np.ndim(leaf), np.shape(leaf))
    on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    if not (on_cpu and leaf.is_fully_addressable):
        return _on_devices(leaf)
    parts = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    with np.errstate(over="ignore"):
        total = np.uint32(0)
        for part in parts:
            total = total + _of_part(np.asarray(part.data), part.index, leaf.shape)
    return total


@jax.jit
def _on_devices(leaf: jax.Array) -> jax.Array:
    bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    if bits.dtype.itemsize < 8:
        bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * bits.dtype.itemsize}"))
    else:
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint32)  # adds an axis of 2
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(bits.shape)):
        position = position + stride * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    weights = position * np.uint32(_SPREAD) + np.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)


def _of_part(part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.uint32:
    if part.dtype.itemsize == 8:
        part = part[..., None].view(np.uint32)
        index, shape = (*index, slice(None)), (*shape, 2)
    bits = part.view(f"uint{8 * part.dtype.itemsize}")
    with np.errstate(over="ignore"):
        position = np.zeros((), np.uint32)
        for axis, (along, stride) in enumerate(zip(index, _strides(shape), strict=True)):
            start = 0 if along.start is None else along.start
            steps = np.arange(start, start + part.shape[axis], dtype=np.uint32) * stride
            position = position[..., None] + steps
        weights = position * np.uint32(_SPREAD) + np.uint32(1)
        return np.sum(bits * weights, dtype=np.uint32)


def _strides(shape: tuple[int, ...]) -> list[np.uint32]:
    sizes = [int(np.prod(shape[axis + 1 :], dtype=object)) for axis in range(len(shape))]
    return [np.uint32(size % 2**32) for size in sizes]
