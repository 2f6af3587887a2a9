"""Read parameters out of released weights: tensor by tensor, into the shardings of the target."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.convert.weights import tables
from diffusion_jax.convert.weights.identify import find_network, unet_family
from diffusion_jax.convert.weights.names import (
    NAME_MAPS,
    FileTensor,
    NameMap,
    Part,
    file_tensors,
    leaves_of,
    to_ours,
)
from diffusion_jax.convert.weights.reading import Weights, open_weights
from diffusion_jax.convert.weights.safetensors import LazyTensor
from diffusion_jax.types import PyTree

EMA = "model_ema."
MIN_EMA = 100
_SHOWN = 10
COMPONENT_OF_KIND = {
    "unet": "unet",
    "vae": "vae",
    "clip text": "text_encoder",
    "clip vision": "image_encoder",
}


class _Options(NamedTuple):
    ignore_keys: Sequence[str]
    allow_missing: Sequence[str]
    allow_unused: Sequence[str]
    zeros: Sequence[str]
    keep_dims: int | None
    make_it_fit: bool


def import_network(
    tree: PyTree,
    weights: Weights | str | os.PathLike,
    kind: str,
    *,
    component: str | None = None,
    prefix: str | None = None,
    **options: Any,
) -> PyTree:
    """Read a network out of a file or folder whose layout is found out -> parameters.

    kind: "unet", "vae", "clip text" or "clip vision". component: folder of a diffusers pipeline,
    where it is not the usual one of the kind. prefix: needed only where a file has several
    networks of a kind. The rest is import_params'.
    Raises ValueError when the file holds another kind of network, and what import_params raises.
    """
    if not isinstance(weights, Weights):
        part = COMPONENT_OF_KIND[kind] if component is None else component
        weights = open_weights(weights, part)
    names = weights.tensors.keys()
    if prefix is not None:
        names = [name for name in names if name.startswith(prefix)]
    found = find_network(names, kind, weights.path)
    return import_params(
        tree, weights, found.name_map, prefix=found.prefix if prefix is None else prefix, **options
    )


def import_params(
    tree: PyTree,
    weights: Weights,
    name_map: NameMap | str,
    *,
    prefix: str = "",
    ema: bool = False,
    ignore_keys: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    allow_unused: Sequence[str] = (),
    zeros: Sequence[str] = (),
    keep_dims: int | None = None,
    make_it_fit: bool = False,
) -> PyTree:
    """Read the parameters of a network from weights whose names start with prefix -> parameters.

    tree: what is wanted, arrays or jax.ShapeDtypeStruct; every leaf is cast to its dtype and put
    into its sharding (a leaf without one goes to the default device). Only arrays can stay as they
    are, where a file does not have them.
    ema: the averages that the file keeps of a UNet ("model_ema.*") instead of the trained weights.
    ignore_keys, allow_missing, allow_unused: regular expressions matched from the start of a name
    in the file, after its prefix: tensors that are not looked at; that may be absent; that may be
    left over. zeros: those that are zeros where they are absent, parameters that nothing uses.
    keep_dims: the first convolution takes this many input channels from the file, and zeros for
    the other ones (a network that sees more than the file's did). make_it_fit: tensors of other
    widths are repeated or cut along their first two axes, see cyclic.
    Raises one ValueError that lists what is missing, left over or of another shape, or that says
    that the file holds no averages.
    Source: latent-diffusion, DDPM.init_from_ckpt; Stable Diffusion 2, LatentFinetuneDiffusion.
    """
    name_map = NAME_MAPS[name_map] if isinstance(name_map, str) else name_map
    wanted = file_tensors(tree, name_map)
    held = _averages(weights, wanted, prefix) if ema else _under(weights.tensors, prefix)
    options = _Options(ignore_keys, allow_missing, allow_unused, zeros, keep_dims, make_it_fit)
    sources = _match(wanted, held, name_map, options, weights.path, prefix)
    by_leaf: dict[str, list[tuple[FileTensor, Part, LazyTensor]]] = {}
    for tensor in wanted:
        for part in tensor.parts if tensor.name in sources else ():
            by_leaf.setdefault(part.path, []).append((tensor, part, sources[tensor.name]))
    kept = [p for p, leaf in leaves_of(tree).items() if _absent(by_leaf, p, leaf)]
    abstract = [p for p in kept if isinstance(leaves_of(tree)[p], jax.ShapeDtypeStruct)]
    if abstract:
        raise ValueError(
            f"{weights.path} does not have {_few(abstract)}; to allow that, give arrays as their "
            "initial values, not only shapes"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _read_leaf(by_leaf, "/".join(e.key for e in path), leaf, kept), tree
    )


def _under(tensors: Mapping[str, LazyTensor], prefix: str) -> dict[str, LazyTensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _averages(weights: Weights, wanted: list[FileTensor], prefix: str) -> dict[str, LazyTensor]:
    """Find model_ema.<name without its first module and dots> of what is wanted."""
    count = sum(name.startswith(EMA) for name in weights.tensors)
    if count <= MIN_EMA:
        raise ValueError(
            f"{weights.path} has no averages (EMA): {count} of its names start with {EMA}; import "
            "the trained weights with ema = False"
        )
    inner = prefix.partition(".")[2]
    twins = {EMA + (inner + t.name).replace(".", ""): t.name for t in wanted}
    start = EMA + inner.replace(".", "")
    return {
        twins[name] if name in twins else name: held
        for name, held in weights.tensors.items()
        if name.startswith(start) and name not in (f"{EMA}decay", f"{EMA}num_updates")
    }


def _match(
    wanted: list[FileTensor],
    held: dict[str, LazyTensor],
    name_map: NameMap,
    options: _Options,
    path: Path,
    prefix: str,
) -> dict[str, LazyTensor]:
    """Pair what is wanted with what a file holds; raise one error for all that does not fit."""
    held = {name: t for name, t in held.items() if not _matches(name, options.ignore_keys)}
    sources, missing, shapes, used = {}, [], [], set()
    for tensor in wanted:
        name = next((n for n in (tensor.name, *tensor.aliases) if n in held), None)
        if name is None and _matches(tensor.name, options.zeros):
            sources[tensor.name] = _zeros(tensor.shape)
            continue
        if name is None:
            if not _matches(tensor.name, (*options.ignore_keys, *options.allow_missing)):
                missing.append(f"{prefix}{tensor.name}")
            continue
        used.add(name)
        fitted = _fit(held[name], tensor, name_map, options)
        if fitted is None:
            there, here = held[name].shape, tensor.shape
            shapes.append(f"{prefix}{name} {there} (here {here})")
        else:
            sources[tensor.name] = fitted
    ignorable = (*options.allow_unused, *name_map.ignorable, *(() if prefix else tables.BUFFERS))
    unused = [prefix + n for n in held if n not in used and not _matches(n, ignorable)]
    if missing or shapes or unused:
        problems = ((missing, "missing"), (unused, "unused"), (shapes, "of another shape"))
        told = "; ".join(f"{len(n)} {what}: {_few(n)}" for n, what in problems if n)
        raise ValueError(f"{path} does not fit{_families(wanted, held, name_map)}: {told}")
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
    held: LazyTensor, tensor: FileTensor, name_map: NameMap, options: _Options
) -> LazyTensor | None:
    """See a file's tensor in the wanted shape; None when it does not fit."""
    shape = tensor.shape
    if held.shape == shape:
        return held
    if len(shape) > 1 and _core(held.shape) == _core(shape):
        # A dense layer and a 1 x 1 convolution hold the same numbers.
        return LazyTensor(shape, held.dtype, lambda: held.load().reshape(shape))
    if options.make_it_fit and len(held.shape) == len(shape) and held.shape[2:] == shape[2:]:
        return LazyTensor(shape, held.dtype, lambda: cyclic(held.load(), shape))
    keep_dims = options.keep_dims
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

    n of j is one more than how often its old channel is used: with 4 old channels and 9 new ones 4
    for the first and 3 for the others. One more is what Stable Diffusion 2 counts; with the true
    count, sums over repeated inputs would be kept.
    Source: Stable Diffusion 2, DDPM.init_from_ckpt, make_it_fit.
    """
    rows = np.arange(shape[0]) % array.shape[0]
    if len(shape) == 1:
        return array[rows]
    columns = np.arange(shape[1]) % array.shape[1]
    uses = 1 + np.bincount(columns, minlength=array.shape[1])[columns]
    uses = uses.reshape(1, -1, *(1,) * (len(shape) - 2))
    return (array[rows][:, columns] / uses).astype(array.dtype)


def _zeros(shape: tuple[int, ...]) -> LazyTensor:
    return LazyTensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def _absent(by_leaf: Mapping[str, list], path: str, leaf: Any) -> bool:
    """Whether a leaf keeps its values; ones that are there in part are an error."""
    if path not in by_leaf:
        return True
    blocks = [part.index for _, part, _ in by_leaf[path]]
    if blocks != [None] and len(blocks) != leaf.shape[0]:
        raise ValueError(f"only {len(blocks)} of the {leaf.shape[0]} blocks of {path} are there")
    return False


def _read_leaf(by_leaf: Mapping[str, list], path: str, leaf: Any, kept: Sequence[str]) -> Any:
    """Read one leaf into its sharding, its parts one after the other."""
    if path in kept:
        return leaf
    sources, cache = by_leaf[path], {}
    sharding = getattr(leaf, "sharding", None)
    # One piece is read for all devices, so nothing is kept for the next one.
    whole_at_once = sharding is None or sharding.is_fully_replicated

    def part(i: int) -> np.ndarray:
        tensor, part, source = sources[i]
        if i in cache:
            whole = cache[i]
        else:
            cache.clear()
            whole = source.load()
            if not whole_at_once:
                cache[i] = whole
        if len(tensor.parts) > 1:
            size = whole.shape[0] // len(tensor.parts)
            place = tensor.parts.index(part) * size
            whole = whole[place : place + size]
        return to_ours(whole, tensor.layout)

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


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
