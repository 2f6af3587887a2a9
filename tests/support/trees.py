"""Trees of random numbers where only shapes are known: nothing is traced or compiled for them."""

from typing import Any

import jax
import numpy as np


def drawn(tree: Any, seed: int = 0) -> Any:
    """Draw every leaf of a tree of shapes, other numbers for each: kernels keep the size of what
    they multiply, scales are near 1, all else is near 0; integers are 0. Shardings are kept."""
    stream = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if not np.issubdtype(leaf.dtype, np.floating):
            values = np.zeros(leaf.shape, leaf.dtype)
        else:
            width = np.prod(leaf.shape[:-1]) if name == "kernel" else 100.0
            values = stream.standard_normal(leaf.shape) / np.sqrt(width) + (name == "scale")
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, tree)
