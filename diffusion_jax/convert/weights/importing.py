"""Read parameters out of released weights, tensor by tensor, into the target's shardings."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert.weights import tables
from diffusion_jax.convert.weights.identify import find_network, find_networks, unet_family
from diffusion_jax.convert.weights.names import (
    FileTensor,
    NameMap,
    Part,
    average_name,
    file_tensors,
    find_kind,
    find_name_map,
    leaves_of,
    to_ours,
)
from diffusion_jax.convert.weights.reading import Weights, diffusers_components, open_weights
from diffusion_jax.convert.weights.safetensors import LazyTensor, count_nonfinite
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted, few_of

MIN_EMA = 100
_FIRST_OF_UNET = ("model.diffusion_model.", "input_blocks.0.0.weight")
# What holds a leaf, or a block of it, and where its numbers are.
Source = tuple[FileTensor, Part, LazyTensor]


class Rules(NamedTuple):
    """How a file may differ from the network: names that may be absent or extra, other shapes.

    The first four are regular expressions, matched from the start of a name without its prefix.
    ignore_keys: tensors of the file that are not read. allow_missing: tensors that the file may
    lack. allow_unused: tensors of the file that nothing needs. zeros: tensors that become zeros
    where the file lacks them, because nothing uses them.
    keep_dims: the first convolution takes this many input channels from the file, and zeros for
    the other ones. make_it_fit: tensors of other widths are repeated or cut along their first two
    axes, see cyclic. nonfinite: NaN and infinite numbers are read, too.
    Source: latent-diffusion, DDPM.init_from_ckpt; Stable Diffusion 2, LatentFinetuneDiffusion.
    """

    ignore_keys: Sequence[str] = ()
    allow_missing: Sequence[str] = ()
    allow_unused: Sequence[str] = ()
    zeros: Sequence[str] = ()
    keep_dims: int | None = None
    make_it_fit: bool = False
    nonfinite: bool = False


def import_network(
    tree: PyTree,
    weights: Weights | str | os.PathLike,
    kind: str,
    *,
    number: int | None = None,
    prefix: str | None = None,
    ema: bool = False,
    **rules: Any,
) -> PyTree:
    """Read one network out of a file or folder, whose names are recognised -> parameters.

    tree, ema, rules: see import_params. kind: "unet", "dit", "vae", "clip text" or "clip vision".
    number: which network of this kind, counted from 0; None for the only one, or the one with a
    usual prefix. prefix: what its names start with, where this is known.
    Raises ValueError when the file does not hold this network, and what import_params raises.
    """
    if not isinstance(weights, Weights):
        path = Path(os.path.expanduser(weights))
        weights = open_network(path, kind, number or 0)
        number = None if diffusers_components(path) else number
    names = [name for name in weights.tensors if name.startswith(prefix or "")]
    if ema and average_name(*_FIRST_OF_UNET) in weights.tensors:
        names.append("".join(_FIRST_OF_UNET))  # the file may hold nothing but averages
    found = find_network(names, kind, weights.path, number)
    prefix = found.prefix if prefix is None else prefix
    return import_params(tree, weights, found.name_map, prefix=prefix, ema=ema, **rules)


def open_network(
    path: str | os.PathLike, kind: str, number: int = 0, *, variant: str | None = None
) -> Weights:
    """Open a file, or the part of a diffusers folder with the number-th network of a kind.

    variant: see open_weights. Raises ValueError when the folder has fewer of them, and what
    open_weights raises.
    """
    path, wanted = Path(os.path.expanduser(path)), find_kind(kind).folder
    parts = diffusers_components(path)
    if not parts:
        return open_weights(path, variant=variant)
    fits = _parts_of(parts, kind)
    if number >= len(fits):
        raise ValueError(
            f"{path} has {counted(len(fits), 'part', 'parts')} named {wanted}, and number "
            f"{number + 1} is needed; it has {', '.join(parts)}"
        )
    return open_weights(path, fits[number], variant=variant)


def count_networks(path: str | os.PathLike, kind: str, *, variant: str | None = None) -> int:
    """Count the networks of a kind in a file, or the parts of a diffusers folder for them."""
    path = Path(os.path.expanduser(path))
    parts = diffusers_components(path)
    if parts:
        return len(_parts_of(parts, kind))
    names = open_weights(path, variant=variant).tensors
    return sum(network.kind == kind for network in find_networks(names))


def _parts_of(parts: Sequence[str], kind: str) -> list[str]:
    wanted = find_kind(kind).folder
    return [part for part in parts if part == wanted or part.startswith(f"{wanted}_")]


def import_params(
    tree: PyTree,
    weights: Weights,
    name_map: NameMap | str,
    *,
    prefix: str = "",
    ema: bool = False,
    **rules: Any,
) -> PyTree:
    """Read the parameters of a network from weights whose names start with prefix -> parameters.

    tree: the wanted parameters, arrays or jax.ShapeDtypeStruct; every leaf is cast to its dtype and
    put into its sharding (a leaf without one goes to the default device). Leaves that the file does
    not have keep their values, so they have to be arrays.
    ema: read the averages that the file keeps of a UNet ("model_ema.*"), not the trained weights.
    rules: the fields of Rules.
    Raises one ValueError that lists what is missing, left over or of another shape, or that says
    that the file holds no averages.
    """
    name_map = find_name_map(name_map)
    wanted = file_tensors(tree, name_map)
    if ema:
        held = _averages(weights, wanted, prefix)
    else:
        own = [name for name in weights.tensors if name.startswith(prefix)]
        held = {name.removeprefix(prefix): weights.tensors[name] for name in own}
    allowed, bad = Rules(**rules), {}
    sources = _match(wanted, held, name_map, allowed, weights.path, prefix)
    if not allowed.nonfinite:
        sources = {
            name: tensor._replace(load=functools.partial(_count, prefix + name, tensor, bad))
            for name, tensor in sources.items()
        }
    by_leaf: dict[str, list[Source]] = {}
    for tensor in wanted:
        for part in tensor.parts if tensor.name in sources else ():
            by_leaf.setdefault(part.path, []).append((tensor, part, sources[tensor.name]))
    leaves = leaves_of(tree)
    for path, found in by_leaf.items():
        if found[0][1].index is not None and len(found) != leaves[path].shape[0]:
            count = f"only {len(found)} of the {leaves[path].shape[0]} blocks"
            raise ValueError(f"{weights.path}: {count} of {path} are there")
    shapes = [p for p, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    absent = [path for path in shapes if path not in by_leaf]
    if absent:
        raise ValueError(
            f"{weights.path} does not have {few_of(absent)}; to allow that, give arrays as their "
            "initial values, not only shapes"
        )

    def read(path: Any, leaf: Any) -> Any:
        name = "/".join(entry.key for entry in path)
        return _read_leaf(by_leaf[name], leaf) if name in by_leaf else leaf

    found = jax.tree_util.tree_map_with_path(read, tree)
    if bad:
        raise ValueError(
            f"{weights.path} holds {sum(bad.values()):,} NaN or infinite numbers in {len(bad)} "
            f"tensors, the first is {min(bad)}; get another copy, or set ckpt_check = False (or "
            "nonfinite = True in a call) to read it all the same"
        )
    return found


def _count(name: str, tensor: LazyTensor, bad: dict[str, int]) -> np.ndarray:
    """Load a tensor and note how many of its numbers are NaN or infinite."""
    array = tensor.load()
    count = count_nonfinite(array)
    if count:
        bad[name] = count
    return array


def _averages(weights: Weights, wanted: list[FileTensor], prefix: str) -> dict[str, LazyTensor]:
    """Find the averages of the wanted tensors, by the tensors' own names."""
    count = sum(name.startswith(tables.EMA) for name in weights.tensors)
    if count <= MIN_EMA:
        raise ValueError(
            f"{weights.path} has no averages (EMA): {count} of its names start with {tables.EMA}; "
            "import the trained weights with ema = False"
        )
    own = {average_name(prefix, tensor.name): tensor.name for tensor in wanted}
    counters = (f"{tables.EMA}decay", f"{tables.EMA}num_updates")
    return {
        own.get(name, name): held
        for name, held in weights.tensors.items()
        if name.startswith(average_name(prefix, "")) and name not in counters
    }


def _match(
    wanted: list[FileTensor],
    held: dict[str, LazyTensor],
    name_map: NameMap,
    rules: Rules,
    path: Path,
    prefix: str,
) -> dict[str, LazyTensor]:
    """Pair wanted tensors with a file's tensors; raise one error for everything that differs."""
    held = {name: t for name, t in held.items() if not _matches(name, rules.ignore_keys)}
    sources, missing, shapes, integers, used = {}, [], [], [], set()
    for tensor in wanted:
        if tensor.turned in held:
            held[tensor.name] = _turned(held.pop(tensor.turned))
        name = next((n for n in (tensor.name, *tensor.aliases) if n in held), None)
        if name is None and _matches(tensor.name, rules.zeros):
            zeros = functools.partial(np.zeros, tensor.shape, np.float32)
            sources[tensor.name] = LazyTensor(tensor.shape, np.dtype(np.float32), zeros)
            continue
        if name is None:
            if not _matches(tensor.name, (*rules.ignore_keys, *rules.allow_missing)):
                missing.append(f"{prefix}{tensor.name}")
            continue
        used.add(name)
        if not jnp.issubdtype(held[name].dtype, jnp.inexact):
            integers.append(f"{prefix}{name} {held[name].dtype}")
        fitted = _fit(held[name], tensor, name_map, rules)
        if fitted is None:
            there, here = held[name].shape, tensor.shape
            shapes.append(f"{prefix}{name} {there} (here {here})")
        else:
            sources[tensor.name] = fitted
    ignorable = (*rules.allow_unused, *name_map.ignorable, *(() if prefix else tables.BUFFERS))
    unused = [prefix + n for n in held if n not in used and not _matches(n, ignorable)]
    problems = (
        (missing, "missing"),
        (unused, "unused"),
        (shapes, "of another shape"),
        (integers, "of whole numbers, which are no weights without their scales"),
    )
    if any(names for names, _ in problems):
        differences = "; ".join(f"{len(n)} {what}: {few_of(n)}" for n, what in problems if n)
        raise ValueError(f"{path} does not fit{_families(wanted, held, name_map)}: {differences}")
    return sources


def _families(wanted: list[FileTensor], held: Mapping[str, LazyTensor], name_map: NameMap) -> str:
    if name_map.kind != "unet" or not any("." in name for name in held):
        return f" the {name_map.kind} here"
    here = unet_family({tensor.name: tensor.shape for tensor in wanted})
    there = unet_family({name: tensor.shape for name, tensor in held.items()})
    if here.words == there.words:
        return f" the network here, {here.words}"
    return f": it holds {there.words}, and the network here is {here.words}"


def _fit(
    held: LazyTensor, tensor: FileTensor, name_map: NameMap, rules: Rules
) -> LazyTensor | None:
    """Give a file's tensor the wanted shape; None when it does not fit."""
    shape = tensor.shape
    if held.shape == shape:
        return held
    if len(shape) > 1 and _core(held.shape) == _core(shape):
        # A dense layer and a 1 x 1 convolution hold the same numbers.
        return LazyTensor(shape, held.dtype, lambda: held.load().reshape(shape))
    if rules.make_it_fit and len(held.shape) == len(shape) and held.shape[2:] == shape[2:]:
        return LazyTensor(shape, held.dtype, lambda: cyclic(held.load(), shape))
    keep_dims = rules.keep_dims
    if keep_dims is None or tensor.name != name_map.first or len(held.shape) != len(shape):
        return None
    theirs, ours = list(held.shape), list(shape)
    if theirs[:1] + theirs[2:] != ours[:1] + ours[2:] or keep_dims > min(theirs[1], ours[1]):
        return None

    def widened() -> np.ndarray:
        array = np.zeros(shape, held.dtype)
        array[:, :keep_dims] = held.load()[:, :keep_dims]
        return array

    return LazyTensor(shape, held.dtype, widened)


def cyclic(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Make a file's [out in ...] or [out] as large as shape: new[i, j] = old[i % out, j % in] / n.

    n is one more than the number of new channels that repeat the old channel j % in: with 4 old and
    9 new channels, 4 for the first and 3 for the others. Stable Diffusion 2 counts that one more;
    without it, sums over repeated inputs would stay the same.
    Source: Stable Diffusion 2, DDPM.init_from_ckpt, make_it_fit.
    """
    rows = np.arange(shape[0]) % array.shape[0]
    if len(shape) == 1:
        return array[rows]
    columns = np.arange(shape[1]) % array.shape[1]
    uses = 1 + np.bincount(columns, minlength=array.shape[1])[columns]
    uses = uses.reshape(1, -1, *(1,) * (len(shape) - 2))
    return (array[rows][:, columns] / uses).astype(array.dtype)


def _turned(held: LazyTensor) -> LazyTensor:
    return LazyTensor(held.shape[::-1], held.dtype, lambda: held.load().T)


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def _read_leaf(sources: Sequence[Source], leaf: Any) -> Any:
    """Read one leaf into its sharding, from one file tensor after the other."""
    sharding = getattr(leaf, "sharding", None)
    # Every device of a split leaf asks for its piece; the last tensor is kept for the next device.
    keep = sharding is not None and not sharding.is_fully_replicated
    cache: dict[int, np.ndarray] = {}

    def part(i: int) -> np.ndarray:
        tensor, part, source = sources[i]
        if i not in cache:
            cache.clear()
            cache[i] = source.load()
        whole = cache[i] if keep else cache.pop(i)
        if len(tensor.parts) > 1:
            size = whole.shape[0] // len(tensor.parts)
            place = tensor.parts.index(part) * size
            whole = whole[place : place + size]
        return to_ours(whole, tensor.axes)

    def read(index: Any) -> np.ndarray:
        if sources[0][1].index is None:
            return np.asarray(part(0)[index], leaf.dtype)
        rows = range(leaf.shape[0])[index[0]] if index else range(leaf.shape[0])
        shape = np.broadcast_to(np.empty(()), leaf.shape[1:])[index[1:]].shape
        stacked = np.empty((len(rows), *shape), leaf.dtype)
        for row, i in enumerate(rows):
            stacked[row] = part(i)[index[1:]]
        return stacked

    if sharding is None:
        return jax.device_put(read(()))
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)
