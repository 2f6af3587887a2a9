"""Where activations lie on a mesh: each device has its own samples, or frames of videos.

Otherwise the compiler follows the parameters that fsdp splits, and splits the features of some
activations, which it then has to send from all devices to all.
"""

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from diffusion_jax.devices.mesh import CONTEXT_AXIS

# The mesh axis that splits heads and features; every other one splits the batch (see
# diffusion_jax/devices/partition.py).
FEATURE_AXIS = "tensor"


def batch_axes(mesh: jax.sharding.AbstractMesh, batch: int) -> tuple[str, ...] | None:
    """Name the axes that split a batch of this size; None where they do not divide it.

    "context" is one of them where it can be: it splits what has a row for each frame.
    """
    axes = tuple(axis for axis in mesh.axis_names if axis != FEATURE_AXIS)
    for chosen in (axes, tuple(axis for axis in axes if axis != CONTEXT_AXIS)):
        if batch % math.prod(mesh.shape[axis] for axis in chosen) == 0:
            return chosen
    return None


def batch_parts(batch: int) -> int:
    """Count the devices among which a batch of this size is split on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = batch_axes(mesh, batch)
    return 1 if axes is None else math.prod(mesh.shape[axis] for axis in axes)


def by_sample(x: Array) -> Array:
    """Keep x [b ...], or frames x [(b t) ...], and the gradient split by sample; return x.

    The mesh is taken from the context (jax.set_mesh, mesh.on_mesh). Without one, or where the
    devices do not divide the batch, x is left alone. "tensor" may still split other axes of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = batch_axes(mesh, x.shape[0])
    if axes is None or all(mesh.shape[axis] == 1 for axis in axes):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free))
