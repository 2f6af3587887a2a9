"""Random weights without a compilation: numbers that keep activations near 1, and no zeros."""

from typing import Any

import jax
import numpy as np

from diffusion_jax.experiment import Experiment
from diffusion_jax.types import PyTree


def random_weights(shapes: PyTree, seed: int) -> PyTree:
    """Draw a tree of weights of these shapes, dtypes and shardings, if they have any.

    Gains are near 1, kernels N(0, 1 / fan-in), all else N(0, 0.01).
    """
    numbers = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        spread = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if name == "kernel" else 0.1
        values = spread * numbers.standard_normal(leaf.shape, np.float32) + (name == "scale")
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_frozen(built: Experiment) -> PyTree:
    """Make what training and sampling read and never change: the constants, and random weights of
    frozen networks."""
    networks = ("conditioner", "first_stage")
    shapes = {name: built.abstract_frozen()[name] for name in networks}
    return {**built.frozen_constants(), **random_weights(shapes, seed=1)}
