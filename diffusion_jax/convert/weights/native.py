"""Trees of parameters under our own names in safetensors: no name is changed, no axis is moved.

A native file holds "params/network/out_2/bias" and so on, and one text about the model in its
header. Other programs cannot use its names; this one needs nothing beside the file.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert.weights.exporting import Exported, as_written, on_host
from diffusion_jax.convert.weights.names import leaves_of
from diffusion_jax.convert.weights.reading import Weights, is_safetensors
from diffusion_jax.convert.weights.safetensors import CODES, count_nonfinite, read_metadata
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted, few_of

# The word of the header that marks a native file.
KEY = "diffusion_jax"
_SHOWN = 4


def read_about(path: str | os.PathLike) -> str | None:
    """Read the text about the model in the header of a native file; None for any other path."""
    path = Path(os.path.expanduser(path))
    if not (path.is_file() and is_safetensors(path)):
        return None
    metadata = read_metadata(path)
    return metadata[KEY] if KEY in metadata else None


def export_tree(
    tree: PyTree, prefix: str, *, dtype: Any = None, nonfinite: bool = False
) -> Exported:
    """Describe the leaves of a tree as the tensors of a file, one at a time.

    dtype: of the floating-point leaves; None keeps the dtype of each, and single numbers keep
    theirs always. nonfinite: NaN and infinite numbers are written, too.
    Raises ValueError for a dtype that safetensors lacks, and as_written's while they are read.
    """
    leaves = leaves_of(tree)

    def kind(name: str) -> np.dtype:
        leaf = leaves[name]
        casts = dtype is not None and leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
        chosen = np.dtype(dtype if casts else leaf.dtype)
        if chosen not in CODES:
            raise ValueError(f"dtype {chosen} of {prefix}{name} cannot be written as safetensors")
        return chosen

    described = {prefix + name: (tuple(leaf.shape), kind(name)) for name, leaf in leaves.items()}
    return Exported(
        described,
        (
            (prefix + name, as_written(prefix + name, on_host(leaf), kind(name), nonfinite))
            for name, leaf in leaves.items()
        ),
    )


def import_tree(
    abstract: PyTree, weights: Weights, prefix: str, *, nonfinite: bool = False
) -> PyTree:
    """Read the tensors of a native file into the shapes, dtypes and shardings of a tree.

    Raises ValueError when the file lacks a leaf, has more under this prefix or another shape, and,
    unless nonfinite, when it holds NaN or infinite numbers.
    """
    wanted = leaves_of(abstract)
    names = [name for name in weights.tensors if name.startswith(prefix)]
    held = {name.removeprefix(prefix): weights.tensors[name] for name in names}
    problems = {
        "missing": [name for name in wanted if name not in held],
        "unused": [name for name in held if name not in wanted],
        "of another shape": [
            f"{name} {held[name].shape} (here {leaf.shape})"
            for name, leaf in wanted.items()
            if name in held and held[name].shape != leaf.shape
        ],
    }
    if any(problems.values()):
        differences = "; ".join(
            f"{len(n)} {what}: {few_of(n, _SHOWN)}" for what, n in problems.items() if n
        )
        raise ValueError(f"{weights.path} does not fit the config, in {prefix}: {differences}")

    def read(path: Any, leaf: Any) -> jax.Array:
        name = "/".join(entry.key for entry in path)
        array = held[name].load()
        bad = 0 if nonfinite else count_nonfinite(array)
        if bad:
            raise ValueError(
                f"{weights.path} holds "
                f"{counted(bad, 'NaN or infinite number', 'NaN or infinite numbers')} in "
                f"{prefix}{name}; get another copy, or set ckpt_check = False to read it all the "
                "same"
            )
        part: Callable[[Any], np.ndarray] = lambda index: np.asarray(array[index], leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree_util.tree_map_with_path(read, abstract)


def read_tree(weights: Weights, prefix: str) -> dict[str, Any]:
    """Read all tensors of a native file under a prefix as nested dicts of NumPy arrays."""
    tree: dict[str, Any] = {}
    for name, tensor in weights.tensors.items():
        if name.startswith(prefix):
            *parents, last = name.removeprefix(prefix).split("/")
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = tensor.load()
    return tree
