"""Where the leaves of a tree lie on a mesh, by regex rules over their paths."""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.devices.mesh import replicated
from diffusion_jax.types import PyTree

# Leaves with fewer elements stay whole: gathering them costs more than their memory is worth.
MIN_SIZE = 2**16
# Leaves of a stack of blocks that a scan goes through have the depth as first dimension.
STACK = re.compile(
    r"/((transformer_)?blocks/|(time_stack|time_mix_blocks|motion_blocks)/(norm|attn|ff))"
)

# One entry per array dimension: a mesh axis, several of them, or None for "not split".
Spec: TypeAlias = Sequence[str | Sequence[str] | None]
# A Spec, or a function of the mesh, the path and the shape of a leaf that returns one.
Layout: TypeAlias = Spec | Callable[[Mesh, str, tuple[int, ...]], Spec]
# A regex, and the layout of every leaf in whose path it is found (re.search).
Rule: TypeAlias = tuple[str, Layout]


class Split(NamedTuple):
    """A kind of layer that the axis "tensor" splits.

    pattern: regex found in the paths of its parameters. dimension: the split one, counted from the
    end. by_head: it holds attention heads, which must stay whole. parts: how many projections of
    each head it holds.
    """

    pattern: str
    dimension: int
    by_head: bool = False
    parts: int = 1


# A layer split by columns is followed by one split by rows, so that the devices exchange one sum
# for each pair (Shoeybi et al. 2019, "Megatron-LM", section 3; for GEGLU see docs/pods.md).
TRANSFORMER_SPLITS = (
    Split(r"/to_[qkv]/kernel$", -1, by_head=True),
    Split(r"/to_out_0/kernel$", -2, by_head=True),
    Split(r"/ff/net_0/proj/(kernel|bias)$", -1),
    Split(r"/ff/net_2/kernel$", -2),
    Split(r"/ff_in/net_0/proj/(kernel|bias)$", -1),
    Split(r"/ff_in/net_2/kernel$", -2),
    Split(r"/self_attn/[qkv]_proj/(kernel|bias)$", -1, by_head=True),
    Split(r"/self_attn/out_proj/kernel$", -2, by_head=True),
    Split(r"/mlp/fc1/(kernel|bias)$", -1),
    Split(r"/mlp/fc2/kernel$", -2),
)
# AttentionBlock of models/layers/attention.py has its channels in the order (head, q k v, channel).
ATTENTION_BLOCK_SPLITS = (
    Split(r"/qkv/(kernel|bias)$", -1, by_head=True, parts=3),
    Split(r"/proj_out/kernel$", -2, by_head=True),
)


def fsdp(*, axis: str = "fsdp", min_size: int = MIN_SIZE) -> Layout:
    """Make a layout that splits the largest dimension that divides, ZeRO 3 (arXiv:1910.02054).

    Leaves with fewer than `min_size` elements stay whole. Of equally large dimensions the last one
    is split, the output channels of a kernel. The depth of a stack of blocks is never split.
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
    """Make a layout in which "tensor" splits the layers of `splits`, and "fsdp" what is large.

    A leaf that both split is split in two dimensions, or in one by both if no other divides. A
    layer whose heads or features "tensor" does not divide is split by "fsdp" alone, and a warning
    is logged once for its kind.

    Args:
        splits: the first whose pattern is found in a path decides.
        heads: (path, width) -> number of attention heads in that width; None where no layer is
            split by head.
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
    """Split the largest dimension that no other axis has taken over an axis."""
    parts = mesh.shape[axis]
    spec: list[str | Sequence[str] | None] = [
        taken[i] if i in taken else None for i in range(len(shape))
    ]
    if parts == 1 or math.prod(shape) < min_size:
        return spec if taken else ()
    free = [i for i in range(1 if STACK.search(path) else 0, len(shape)) if i not in taken]
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
    """Make the shardings of a tree by rules over paths such as "params/conv/kernel".

    The first rule whose regex is found in the path decides; a leaf that no rule matches is
    replicated. Paths are made of dictionary keys, field names and indices, so the moments of an
    optimizer ("opt_state/0/mu/conv/kernel") follow the same rules as the parameters. A dimension
    that its mesh axes do not divide is replicated, and so is a leaf with fewer dimensions than its
    layout (the factored moments of adafactor); each is logged once a path.

    Args:
        mesh: the devices.
        tree: arrays, jax.ShapeDtypeStruct or numbers.
        rules: (regex, layout) pairs.

    Raises:
        ValueError: a rule matches no path, names an axis that the mesh lacks, or one axis twice.
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
                f"sharding rule {pattern!r} should match one of the {len(paths)} paths, such as "
                f"{', '.join(paths[:3])}"
            )
    return shardings


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
                f"{where}: mesh axis {axis!r} is unknown; choose from {', '.join(mesh.axis_names)}"
            )
    if len(set(axes)) != len(axes):
        raise ValueError(f"{where} should use a mesh axis once: {', '.join(axes)}")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
