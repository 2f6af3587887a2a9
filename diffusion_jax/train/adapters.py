"""Adapters (LoRA): small trained factors beside the frozen kernels of a network, as trees.

A tree of adapters has the layers of the network's tree that are adapted, and for each of them
"down", "up" and perhaps "magnitude", see models.layers.low_rank. Layers are named by their paths,
such as "network/input_blocks_1_1/transformer_blocks_0/attn1/to_q".
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.devices.partition import STACK
from diffusion_jax.models.layers.basic import torch_uniform
from diffusion_jax.models.layers.low_rank import (
    DOWN,
    FACTORS,
    KEEP,
    MAGNITUDE,
    UP,
    merged_kernel,
)
from diffusion_jax.types import PyTree

_SHOWN = 24


class Adapter(NamedTuple):
    """The size of one layer's factors: their rank, and the number that multiplies their product."""

    rank: int
    scale: float = 1.0


class Wanted(NamedTuple):
    """Layers to adapt: those in whose path `pattern`, a regular expression, is found."""

    pattern: str
    adapter: Adapter


def layers_of(tree: PyTree) -> dict[str, Any]:
    """List the kernels of a tree that can be adapted, by the paths of their layers."""
    return {path: layer["kernel"] for path, layer in _walk(tree) if layer["kernel"].ndim >= 2}


def choose_layers(tree: PyTree, wanted: Mapping[str, Wanted]) -> dict[str, Adapter]:
    """Choose the layers of a tree that get adapters; of several patterns the first one decides.

    wanted: by the name that messages have for it.
    Raises ValueError for a pattern that is found in no layer, and lists the layers that there are.
    """
    found: dict[str, Adapter] = {}
    paths = list(layers_of(tree))
    for name, (pattern, adapter) in wanted.items():
        own = [path for path in paths if re.search(pattern, path)]
        if not own:
            raise ValueError(
                f"{name} = {pattern!r} should be found in the path of a layer; there are "
                f"{kinds_of(paths)}"
            )
        for path in own:
            found.setdefault(path, adapter)
    return found


def kinds_of(paths: Iterable[str]) -> str:
    """List paths in words, those once that differ in numbers alone, and not more than fit."""
    kinds = list(dict.fromkeys(re.sub(r"\d+", "N", path) for path in paths))
    more = f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else ""
    return f"{', '.join(kinds[:_SHOWN])}{more}, where N is any number"


def init_adapters(
    key: Array, tree: PyTree, chosen: Mapping[str, Adapter], *, dora: bool = False
) -> PyTree:
    """Make the first adapters of a tree, which change nothing: `up` is 0, float32.

    `down` starts as a layer of PyTorch does. tree: the base, or its shapes.
    """
    kernels, adapters = layers_of(tree), {}
    for number, (path, adapter) in enumerate(sorted(chosen.items())):
        shape, rank = kernels[path].shape, adapter.rank
        stacked = shape[:1] if is_stacked(path) else ()
        draw = torch_uniform(math.prod(shape[len(stacked) : -1]))
        factors = {
            DOWN: draw(jax.random.fold_in(key, number), (*shape[:-1], rank)),
            UP: jnp.zeros((*stacked, rank, shape[-1])),
        }
        if dora:
            factors[MAGNITUDE] = jnp.ones((*stacked, shape[-1]))
        adapters = replaced(adapters, path, factors)
    return adapters


def adapt(
    base: PyTree, adapters: PyTree, chosen: Mapping[str, Adapter], *, dropout: float = 0.0
) -> PyTree:
    """Put adapters beside the kernels of a base, where the modules of a network heed them.

    dropout: of the inputs of `down`.
    """
    for path, adapter in chosen.items():
        factors, layer = at(adapters, path), at(base, path)
        factors = {**factors, UP: adapter.scale * factors[UP]}
        if dropout > 0.0:
            stacked = layer["kernel"].shape[:1] if is_stacked(path) else ()
            factors[KEEP] = jnp.full(stacked, 1.0 - dropout)
        base = replaced(base, path, {**layer, **factors})
    return base


def merge(adapted: PyTree, dtype: Any = None) -> PyTree:
    """Turn kernels with factors beside them into kernels alone, of a dtype or their own one."""
    for path, layer in list(_walk(adapted)):
        if DOWN not in layer:
            continue
        factors = [layer[name] for name in (DOWN, UP, MAGNITUDE) if name in layer]
        compute = jax.vmap(merged_kernel) if is_stacked(path) else merged_kernel
        kernel = layer["kernel"]
        rest = {name: leaf for name, leaf in layer.items() if name not in FACTORS}
        merged = compute(kernel, *factors).astype(dtype or kernel.dtype)
        adapted = replaced(adapted, path, {**rest, "kernel": merged})
    return adapted


def is_stacked(path: str) -> bool:
    """Tell whether the leaves of a layer hold the blocks of a stack on their first axis."""
    return STACK.search(f"/{path}/") is not None


def at(tree: PyTree, path: str) -> Any:
    """Find what a nested dict holds at a path."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def replaced(tree: PyTree, path: str, value: Any) -> PyTree:
    """Copy a nested dict with another value at a path."""
    name, _, rest = path.partition("/")
    child = tree[name] if name in tree else {}
    return {**tree, name: replaced(child, rest, value) if rest else value}


def _walk(tree: PyTree, names: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """List the layers with a kernel, by their paths."""
    if not isinstance(tree, Mapping):
        return
    if "kernel" in tree:
        yield "/".join(names), tree
    for name, child in tree.items():
        yield from _walk(child, (*names, name))
