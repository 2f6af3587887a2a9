"""Global arrays out of what each process holds on its host."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from diffusion_jax.devices.mesh import batch_sharding, batch_shards, process_rows
from diffusion_jax.types import PyTree


def shard_batch(mesh: Mesh, host_batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Make global arrays of this process's rows of a batch, split over BATCH_AXES.

    host_batch has the rows that `process_rows` names, in that order. Arrays that are not numbers
    (captions) stay on the host.
    Raises ValueError when the rows do not divide by the devices of this process.
    """
    sharding, shards = batch_sharding(mesh), batch_shards(mesh)
    local_shards = len(process_rows(mesh, shards))
    arrays = {}
    for name, leaf in host_batch.items():
        local = np.asarray(leaf)
        if not (jnp.issubdtype(local.dtype, jnp.number) or local.dtype == np.bool_):
            continue
        if local.ndim == 0 or local.shape[0] % local_shards:
            raise ValueError(
                f"batch[{name!r}] has shape {local.shape}; its leading axis should "
                f"divide by the {local_shards} devices of this process that split the batch"
            )
        shape = (local.shape[0] // local_shards * shards, *local.shape[1:])
        part = functools.partial(_part, local, process_rows(mesh, shape[0]), shape[0])
        # The one transfer to the devices that a training loop makes.
        with jax.transfer_guard_host_to_device("allow"):
            arrays[name] = jax.make_array_from_callback(shape, sharding, part)
    return arrays


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Put values that every process has on devices, arrays of random keys included.

    With several processes, jax.device_put refuses keys, and compares numbers first. While a
    function is traced its arrays get the sharding as a constraint.
    """

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, Tracer):
            return jax.lax.with_sharding_constraint(leaf, sharding)
        own = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if sharding.is_fully_addressable or not own:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        rows = np.asarray(leaf)
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    return jax.tree.map(place, tree)


def _part(local: np.ndarray, rows: np.ndarray, batch_size: int, index: Any) -> np.ndarray:
    """Find what one device holds of the rows of this process."""
    first, last, _ = index[0].indices(batch_size)
    start = int(np.searchsorted(rows, first))
    return local[start : start + last - first]
