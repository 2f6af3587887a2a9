"""Device meshes, and where the leaves of a tree live on them, by regex rules over paths.

A mesh has four axes: "slices" are groups of devices with a slow network in between, each with a
copy of the model; "data" copies the model inside a slice, "fsdp" splits parameters and optimizer
state, "tensor" splits single layers. A batch is split over all but "tensor". Networks know nothing
of this: the axis types are Auto, so the compiler propagates what the arguments of a jitted function
carry.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.types import PyTree

MESH_AXES = ("slices", "data", "fsdp", "tensor")
BATCH_AXES = ("slices", "data", "fsdp")
# Leaves with fewer elements stay whole: a gather would cost more than the memory is worth.
MIN_SIZE = 2**16
# Leaves of a stack of blocks, which a scan goes through, have the depth as first dimension.
STACK = "/transformer_blocks/"

# One entry per array dimension: a mesh axis, several of them, or None for "not split".
Spec: TypeAlias = Sequence[str | Sequence[str] | None]
# A rule holds for every path in which its regex is found (re.search). The layout is a Spec, or a
# function of the mesh, the path and the shape of the leaf that returns one.
Layout: TypeAlias = Spec | Callable[[Mesh, str, tuple[int, ...]], Spec]
Rule: TypeAlias = tuple[str, Layout]


class Split(NamedTuple):
    """A kind of layer that the axis "tensor" splits.

    pattern: regex found in the paths of its parameters. dimension: the one that is split, from the
    end. by_head: it holds attention heads, which must stay whole. parts: that many times.
    """

    pattern: str
    dimension: int
    by_head: bool = False
    parts: int = 1


# What follows a split to the columns is split by rows, so that one sum over the devices a pair is
# all that they exchange (Shoeybi et al. 2019, "Megatron-LM", section 3; for GEGLU, see
# docs/pods.md).
TRANSFORMER_SPLITS = (
    Split(r"/to_[qkv]/kernel$", -1, by_head=True),
    Split(r"/to_out_0/kernel$", -2, by_head=True),
    Split(r"/ff/net_0/proj/(kernel|bias)$", -1),
    Split(r"/ff/net_2/kernel$", -2),
    Split(r"/self_attn/[qkv]_proj/(kernel|bias)$", -1, by_head=True),
    Split(r"/self_attn/out_proj/kernel$", -2, by_head=True),
    Split(r"/mlp/fc1/(kernel|bias)$", -1),
    Split(r"/mlp/fc2/kernel$", -2),
)
# Of models.attention.AttentionBlock with its channels in the order (head, q k v, channel).
ATTENTION_BLOCK_SPLITS = (
    Split(r"/qkv/(kernel|bias)$", -1, by_head=True, parts=3),
    Split(r"/proj_out/kernel$", -2, by_head=True),
)


def make_mesh(
    *,
    slices: int = 1,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes "slices", "data", "fsdp", "tensor"; one size may be -1: what is left.

    Args:
        slices, data, fsdp, tensor: number of devices along each axis, positive, or -1 for at most
            one of them. Only sums of gradients cross from slice to slice. Slices are those that the
            devices name (TPU), or else equal numbers of devices in the order of the processes.
        devices: the devices to use, all devices of all processes by default.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or TPU devices come from
            another number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"slices": slices, "data": data, "fsdp": fsdp, "tensor": tensor}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh axis {axis}={size} must be a positive number of devices, or -1")
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) > 1:
        raise ValueError(f"mesh axes {unknown} are all -1; at most one can be inferred")
    asked = " ".join(f"{axis}={size}" for axis, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    if unknown and len(devices) % known == 0:
        sizes[unknown[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {asked} does not fit {len(devices)} devices; the sizes must multiply to that "
            "number"
        )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    axis_types = (AxisType.Auto,) * len(shape)
    return Mesh(_arrange(devices, shape), MESH_AXES, axis_types=axis_types)


def _arrange(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Put devices in the order in which neighbours along an axis are close to each other."""
    slices, inside = shape[0], shape[1:]
    named = {device.slice_index for device in devices if hasattr(device, "slice_index")}
    if slices == 1 and len(named) <= 1:
        return jax.make_mesh(shape, MESH_AXES, devices=devices).devices
    if slices == len(named):
        return mesh_utils.create_hybrid_device_mesh(
            (1, *inside), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        raise ValueError(
            f"mesh slices={slices} should be {max(len(named), 1)}, the number of slices that the "
            f"{len(devices)} devices come from"
        )
    blocks = np.asarray(devices, dtype=object).reshape(slices, -1)
    return np.stack([mesh_utils.create_device_mesh(inside, list(block)) for block in blocks])


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Trace `function` knowing the mesh, as under jax.set_mesh, but also inside of jax.jit.

    What the compiler cannot split on its own, such as an attention kernel, asks for it.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis is split over all mesh axes but "tensor"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts `batch_sharding` splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending, int [rows].

    Those of different processes differ, unless "tensor" spans processes: then they share rows.

    Raises:
        ValueError: the batch does not divide by the devices that split it.
    """
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise ValueError(f"a batch of {batch_size} does not divide by the {shards} that split it")
    rows = np.arange(batch_size)
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([rows[index] for index in indices if index is not None]))


def fsdp(*, axis: str = "fsdp", min_size: int = MIN_SIZE) -> Layout:
    """A layout for rules: split the largest dimension that divides, ZeRO 3 (arXiv:1910.02054).

    Leaves with fewer than `min_size` elements stay whole. Of equally large dimensions the last one
    is split, the output channels of a kernel; the depth of a stack of blocks never is.
    """

    def layout(mesh: Mesh, path: str, shape: tuple[int, ...]) -> Spec:
        _check_axes(f"fsdp(axis={axis!r})", (axis,), mesh)
        return _fsdp_spec(mesh, path, shape, axis, min_size, {})

    return layout


def parallel(
    splits: Sequence[Split],
    heads: Callable[[str, int], int] | None = None,
    *,
    min_size: int = MIN_SIZE,
) -> Layout:
    """A layout for rules: "tensor" splits the layers of `splits`, "fsdp" whatever else is large.

    A leaf of both is split in two dimensions, or in one by both if no other divides. A layer whose
    heads or features the axis does not divide is left to "fsdp" alone, logged once a kind.

    Args:
        splits: the first whose pattern is found in a path decides.
        heads: (path, width) -> number of attention heads that share that width; None where no
            layer is split by head.
        min_size: as in `fsdp`; "tensor" splits small leaves too.
    """

    def layout(mesh: Mesh, path: str, shape: tuple[int, ...]) -> Spec:
        taken = {}
        if mesh.shape["tensor"] > 1:
            found = [split for split in splits if re.search(split.pattern, path)]
            if found and _divides(mesh, path, shape, found[0], heads):
                taken = {len(shape) + found[0].dimension: "tensor"}
        return _fsdp_spec(mesh, path, shape, "fsdp", min_size, taken)

    return layout


def _divides(
    mesh: Mesh,
    path: str,
    shape: tuple[int, ...],
    split: Split,
    heads: Callable[[str, int], int] | None,
) -> bool:
    if len(shape) < 2 and path.endswith("/kernel"):
        _warn_once(f"{path}: shape {shape} is no kernel's, the axis tensor does not split it")
        return False
    parts, width = mesh.shape["tensor"], shape[split.dimension]
    if split.by_head:
        assert heads is not None
        units, what = heads(path, width // split.parts), "heads"
    else:
        units, what = width, "features"
    if units % parts:
        _warn_once(
            f"{units} {what} of layers like {split.pattern} do not divide by the {parts} devices "
            "of tensor, which do not split them"
        )
    return units % parts == 0


def _fsdp_spec(
    mesh: Mesh,
    path: str,
    shape: tuple[int, ...],
    axis: str,
    min_size: int,
    taken: Mapping[int, str],
) -> Spec:
    """Split the largest free dimension over an axis, besides what other axes have taken."""
    parts = mesh.shape[axis]
    spec: list[str | Sequence[str] | None] = [
        taken[i] if i in taken else None for i in range(len(shape))
    ]
    if parts == 1 or math.prod(shape) < min_size:
        return spec if taken else ()
    free = [i for i in range(1 if STACK in path else 0, len(shape)) if i not in taken]
    dividing = [i for i in free if shape[i] % parts == 0]
    shared = [i for i, other in taken.items() if shape[i] % (parts * mesh.shape[other]) == 0]
    if dividing:
        spec[max(dividing, key=lambda i: (shape[i], i))] = axis
    elif shared:
        spec[shared[0]] = (taken[shared[0]], axis)
    else:
        _warn_once(
            f"{path}: no dimension of shape {shape} divides by the {parts} devices of {axis}, "
            "which do not split it"
        )
    return spec


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
    """Global arrays from this process's rows of a batch, split over all axes but "tensor".

    Args:
        host_batch: arrays with the batch as leading axis, with the rows that `process_rows` names,
            in that order. Leaves that are not numbers (captions) are dropped: they stay on the
            host.

    Raises:
        ValueError: the rows do not divide by the devices of this process.
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
                f"batch[{name!r}] has shape {local.shape}; its leading axis must "
                f"divide by the {local_shards} devices of this process that split the batch"
            )
        shape = (local.shape[0] // local_shards * shards, *local.shape[1:])
        part = functools.partial(_part, local, process_rows(mesh, shape[0]), shape[0])
        # The one transfer to the devices that a training loop is there to make.
        with jax.transfer_guard_host_to_device("allow"):
            arrays[name] = jax.make_array_from_callback(shape, sharding, part)
    return arrays


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """jax.device_put of values that every process has, arrays of keys included.

    With several processes jax.device_put takes numbers, but no keys, and compares them first.
    """

    def place(leaf: Any) -> jax.Array:
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
    """What one device holds of the rows of this process."""
    first, last, _ = index[0].indices(batch_size)
    start = int(np.searchsorted(rows, first))
    return local[start : start + last - first]


def _partition_spec(mesh: Mesh, path: str, shape: tuple[int, ...], rule: Rule) -> PartitionSpec:
    pattern, layout = rule
    spec = layout(mesh, path, shape) if callable(layout) else layout
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
