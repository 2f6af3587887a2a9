"""Device meshes, and where the leaves of a tree live on them, by regex rules over paths.

A mesh has three axes: "data" copies the model, "fsdp" splits parameters and optimizer state,
"tensor" splits single layers. A batch is split over "data" and "fsdp" together. Networks know
nothing of this: the axis types are Auto, so the compiler propagates what the arguments of a jitted
function carry.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.types import PyTree

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# One entry per array dimension: a mesh axis, several of them, or None for "not split".
Spec: TypeAlias = Sequence[str | Sequence[str] | None]
# A rule holds for every path in which its regex is found (re.search). The layout is a Spec, or a
# function of the mesh and of the shape of the leaf that returns one.
Layout: TypeAlias = Spec | Callable[[Mesh, tuple[int, ...]], Spec]
Rule: TypeAlias = tuple[str, Layout]


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes "data", "fsdp" and "tensor"; one size may be -1: what is left.

    Args:
        data, fsdp, tensor: number of devices along each axis, positive, or -1 for at most one of
            them.
        devices: the devices to use, all devices of all processes by default.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh axis {axis}={size} must be a positive number of devices, or -1")
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ValueError(f"mesh axes {unknown} are all -1; at most one can be inferred")
    known = math.prod(size for size in sizes.values() if size != -1)
    if unknown and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices; "
            "the sizes must multiply to that number"
        )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis is split over "data" and "fsdp" together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def fsdp(*, axis: str = "fsdp", min_size: int = 2**16) -> Layout:
    """A layout for rules: split the largest dimension that divides, ZeRO 3 (arXiv:1910.02054).

    Leaves with fewer than `min_size` elements stay whole: a gather would cost more than the memory
    is worth. Of equally large dimensions the last one is split, the output channels of a kernel.
    """

    def layout(mesh: Mesh, shape: tuple[int, ...]) -> Spec:
        _check_axes(f"fsdp(axis={axis!r})", (axis,), mesh)
        parts = mesh.shape[axis]
        if parts == 1 or math.prod(shape) < min_size:
            return ()
        dividing = [i for i, size in enumerate(shape) if size % parts == 0]
        if not dividing:
            return (axis,)  # does not divide: reported and replicated like any other rule
        chosen = max(dividing, key=lambda i: (shape[i], i))
        return tuple(axis if i == chosen else None for i in range(len(shape)))

    return layout


def tree_shardings(mesh: Mesh, tree: PyTree, rules: Sequence[Rule] = ()) -> PyTree:
    """NamedShardings in the structure of `tree`, by regex over paths such as "params/conv/kernel".

    The first rule whose regex is found in the path decides; a leaf that no rule matches is
    replicated. Paths are made of dictionary keys, field names and indices, so the moments of an
    optimizer ("opt_state/0/mu/conv/kernel") follow the same rules as the parameters. A dimension
    that its mesh axes do not divide is replicated, and a leaf with fewer dimensions than its layout
    (the factored moments of adafactor) too; both are logged once per path.

    Args:
        tree: arrays, jax.ShapeDtypeStruct or numbers.

    Raises:
        ValueError: a rule matches no path, or names an axis that the mesh does not have, or one
            axis twice.
    """
    used: set[int] = set()
    paths: list[str] = []

    def shard(key_path: Any, leaf: Any) -> NamedSharding:
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        paths.append(path)
        matching = [i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path)]
        used.update(matching)
        if not matching:
            return replicated(mesh)
        return NamedSharding(mesh, _partition_spec(mesh, path, np.shape(leaf), rules[matching[0]]))

    shardings = jax.tree_util.tree_map_with_path(shard, tree)
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise ValueError(
                f"sharding rule {pattern!r} matches none of the {len(paths)} paths; "
                f"they look like {', '.join(paths[:3])}"
            )
    return shardings


def shard_batch(mesh: Mesh, host_batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Global arrays from this process's slice of a batch, split over "data" and "fsdp".

    Args:
        host_batch: arrays with the batch as leading axis, this process's rows only. Leaves that are
            not numbers (captions) are dropped: they stay on the host.

    Raises:
        ValueError: the rows do not divide by the devices of this process.
    """
    sharding = batch_sharding(mesh)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    indices = sharding.addressable_devices_indices_map((shards,)).values()
    local_shards = len({index[0].indices(shards) for index in indices if index is not None})
    arrays = {}
    for name, leaf in host_batch.items():
        rows = np.asarray(leaf)
        if not (jnp.issubdtype(rows.dtype, jnp.number) or rows.dtype == np.bool_):
            continue
        if rows.ndim == 0 or rows.shape[0] % local_shards:
            raise ValueError(
                f"batch[{name!r}] has shape {rows.shape}; its leading axis must "
                f"divide by the {local_shards} devices of this process that split the batch"
            )
        # The one transfer to the devices that a training loop is there to make.
        with jax.transfer_guard_host_to_device("allow"):
            arrays[name] = jax.make_array_from_process_local_data(sharding, rows)
    return arrays


def _partition_spec(mesh: Mesh, path: str, shape: tuple[int, ...], rule: Rule) -> PartitionSpec:
    pattern, layout = rule
    spec = layout(mesh, shape) if callable(layout) else layout
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    _check_axes(f"sharding rule {pattern!r}", [axis for axes in entries for axis in axes], mesh)
    if len(entries) > len(shape):
        _warn_once(f"{path}: shape {shape} has fewer dimensions than {spec}, it is replicated")
        return PartitionSpec()
    for i, axes in enumerate(entries):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[i] % parts:
            _warn_once(
                f"{path}: dimension {i} of shape {shape} does not divide by the {parts} "
                f"devices of {axes}, it is replicated"
            )
            entries[i] = ()
    return PartitionSpec(*(axes or None for axes in entries))


def _check_axes(where: str, axes: Sequence[str], mesh: Mesh) -> None:
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{where} names the mesh axis {axis!r}; choose from {', '.join(mesh.axis_names)}"
            )
    if len(set(axes)) != len(axes):
        raise ValueError(f"{where} uses a mesh axis twice: {', '.join(axes)}")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
