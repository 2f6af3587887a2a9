"""The bytes that every device holds between two steps, computed from shapes and shardings."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.train.ema import EmaState
from diffusion_jax.train.power_ema import PowerEmaState
from diffusion_jax.types import PyTree


class Held(NamedTuple):
    """Bytes per device. moments: the optimizer's state without the averages. other: counters."""

    parameters: int
    moments: int
    ema: int
    other: int
    frozen: int
    batch: int


def held_bytes(arguments: tuple[PyTree, PyTree, PyTree]) -> Held:
    """Sum the bytes of the arguments of a train step on one device."""
    state, batch, frozen = arguments
    found = jax.tree.leaves(state.opt_state, is_leaf=_is_average)
    averages = [node[1] for node in found if _is_average(node)]  # without the counter
    ema = device_bytes(averages)
    return Held(
        parameters=device_bytes(state.params),
        moments=device_bytes(state.opt_state) - ema,
        ema=ema,
        other=device_bytes((state.step, state.mutable)),
        frozen=device_bytes(frozen),
        batch=device_bytes(batch),
    )


def device_bytes(tree: PyTree) -> int:
    """Sum the bytes of a tree of abstract arrays on one device."""
    return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def read_bytes(arguments: tuple[PyTree, PyTree, PyTree], used: Sequence[bool]) -> int:
    """Sum the bytes of the leaves that a program uses."""
    leaves = jax.tree.leaves(arguments)
    return sum(_leaf_bytes(leaf) for leaf, use in zip(leaves, used, strict=True) if use)


def _is_average(node: Any) -> bool:
    return isinstance(node, EmaState | PowerEmaState)


def _leaf_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
