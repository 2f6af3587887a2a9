"""The state of a training run, one pytree, and its creation in its final place on the devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffusion_jax.devices.partition import Rule, tree_shardings
from diffusion_jax.types import PyTree


class TrainState(NamedTuple):
    """All that training changes. Keys are no part of it, they follow from the step.

    step: int32 scalar, the number of updates made. params: the trained parameters. opt_state: the
    optimizer's state, the EMA inside it. mutable: the collections that a network writes while it
    trains (BatchNorm statistics), {} for none.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    mutable: PyTree


def init_state(
    params: PyTree, tx: optax.GradientTransformation, mutable: PyTree = None
) -> TrainState:
    """The state before the first update: step 0, fresh optimizer state, `mutable` or {}."""
    mutable = {} if mutable is None else mutable
    return strengthen(TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), mutable))


def abstract_state(
    init_fn: Callable[..., PyTree], mesh: Mesh, rules: Sequence[Rule] = (), *args: Any
) -> PyTree:
    """Shapes, dtypes and shardings of `init_fn(*args)`, what a checkpoint is restored into.

    Returns: the tree of `init_fn` with jax.ShapeDtypeStruct leaves that carry their NamedSharding.
    """
    shapes = jax.eval_shape(init_fn, *args)
    shardings = tree_shardings(mesh, shapes, rules)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def init_sharded(
    init_fn: Callable[..., PyTree], mesh: Mesh, rules: Sequence[Rule] = (), *args: Any
) -> PyTree:
    """`init_fn(*args)` computed on the mesh, each leaf created where the rules put it.

    No device ever holds more than its part of the result. The numbers do not depend on the mesh,
    but for rounding.

    Args:
        init_fn: (*args) -> TrainState, or any other tree of arrays.
        rules: as in `devices.partition.tree_shardings`; paths start at the tree that `init_fn`
            returns.
    """
    abstract = abstract_state(init_fn, mesh, rules, *args)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init_fn, out_shardings=shardings)(*args)


def strengthen(tree: PyTree, like: PyTree = None) -> PyTree:
    """The same values with strong types, in the dtypes of `like` (default: their own).

    A weak type or another dtype in a returned state would compile the next step anew.
    """
    like = tree if like is None else like
    return jax.tree.map(
        lambda leaf, old: jax.lax.convert_element_type(leaf, jnp.result_type(old)), tree, like
    )
