"""Device meshes: four axes, and how a batch is split over them.

"slices" are groups of devices with a slow network in between, each with a copy of the model; "data"
copies the model inside a slice; "fsdp" splits parameters and optimizer state; "tensor" splits
single layers. A batch is split over all axes but "tensor". Networks do not see the mesh: the axis
types are Auto, so the compiler propagates the shardings of a jitted function's arguments.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("slices", "data", "fsdp", "tensor")
BATCH_AXES = ("slices", "data", "fsdp")
# Splits the frames of a video; a mesh has it, before "tensor", only where it splits something.
CONTEXT_AXIS = "context"


def make_mesh(
    *,
    slices: int = 1,
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Make a mesh with the axes "slices", "data", "fsdp", "tensor"; one size may be -1: the rest.

    With context other than 1 the axis "context" lies before "tensor".

    Args:
        slices: number of slices. Only sums of gradients cross from one to another. TPU devices name
            their slice; other devices are divided equally in the order of the processes.
        data: number of copies of the model inside a slice.
        fsdp: number of devices that split parameters and optimizer state.
        context: number of devices that share the frames of each video.
        tensor: number of devices that split single layers.
        devices: the devices to use, all devices of all processes by default.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or TPU devices come from
            another number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"slices": slices, "data": data, "fsdp": fsdp, CONTEXT_AXIS: context, "tensor": tensor}
    if context == 1:
        del sizes[CONTEXT_AXIS]
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh axis {axis} = {size} should be at least 1 device, or -1")
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ValueError(f"mesh axes {' = '.join(unknown)} = -1, which only one of them should be")
    asked = " ".join(f"{axis}={size}" for axis, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    if unknown and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh axes {asked} should multiply to {len(devices)}, the number of devices"
        )
    shape = tuple(sizes.values())
    axis_types = (AxisType.Auto,) * len(shape)
    return Mesh(_arrange(devices, shape), tuple(sizes), axis_types=axis_types)


def _arrange(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Put devices in the order in which neighbours along an axis are close to each other."""
    slices, inside = shape[0], shape[1:]
    named = {device.slice_index for device in devices if hasattr(device, "slice_index")}
    if slices == 1 and len(named) <= 1:
        names = tuple(map(str, range(len(shape))))  # only the devices are taken
        return jax.make_mesh(shape, names, devices=devices).devices
    if slices == len(named):
        return mesh_utils.create_hybrid_device_mesh(
            (1, *inside), (slices, *(1 for _ in inside)), devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        raise ValueError(
            f"mesh axis slices = {slices} should be {max(len(named), 1)}, the number of slices "
            f"that the {len(devices)} devices come from"
        )
    blocks = np.asarray(devices, dtype=object).reshape(slices, -1)
    return np.stack([mesh_utils.create_device_mesh(inside, list(block)) for block in blocks])


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Trace `function` with the mesh in context, as under jax.set_mesh, but also inside of jax.jit.

    Attention kernels and others that the compiler cannot split on its own look for it.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """Make the sharding that keeps a whole copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Make the sharding of a batch: BATCH_AXES split the leading axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Count the parts into which `batch_sharding` splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """List the rows of a global batch that the devices of this process hold, ascending, int [rows].

    Processes hold different rows, except where another axis spans processes, which then share rows.
    Raises ValueError when the batch does not divide by the devices that split it.
    """
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise ValueError(f"a batch of {batch_size} should divide by the {shards} that split it")
    rows = np.arange(batch_size)
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[index] for index in indices if index is not None]))
