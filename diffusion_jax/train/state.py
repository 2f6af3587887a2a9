"""The state of a training run, one pytree, and its creation in its final place on the devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diffusion_jax.devices.partition import Rule, tree_shardings
from diffusion_jax.train.compiler_options import options_for_what_runs_once
from diffusion_jax.types import PyTree


class TrainState(NamedTuple):
    """All that training changes; random keys follow from the step and are not stored.

    step: int32 scalar, the number of updates made. params: the trained parameters. opt_state: the
    optimizer's state, with the EMA inside it. mutable: the collections that a network writes while
    it trains (BatchNorm statistics), {} for none.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    mutable: PyTree


def init_state(
    params: PyTree, tx: optax.GradientTransformation, mutable: PyTree = None
) -> TrainState:
    """Make the state before the first update: step 0, fresh optimizer state, `mutable` or {}."""
    mutable = {} if mutable is None else mutable
    return strengthen(TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), mutable))


def abstract_state(
    init_fn: Callable[..., PyTree], mesh: Mesh, rules: Sequence[Rule] = (), *args: Any
) -> PyTree:
    """Describe the result of `init_fn(*args)`, to restore a checkpoint into it.

    Returns its tree with jax.ShapeDtypeStruct leaves that carry their NamedSharding.
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
    """Compute the arrays of `init_fn(*args)` on the mesh, each made where the rules put it.

    No device ever holds more than its part of the result. Except for rounding, the numbers do not
    depend on the mesh. Rules are as in `devices.partition.tree_shardings`, with paths that start at
    the tree that `init_fn` returns.
    """
    abstract = abstract_state(init_fn, mesh, rules, *args)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = options_for_what_runs_once(mesh)
    return jax.jit(init_fn, out_shardings=shardings, compiler_options=options)(*args)


def owned(state: PyTree, *others: PyTree) -> PyTree:
    """Copy the arrays of a state whose memory other trees hold as well, or the state a second time.

    A step that donates its state deletes its arrays for all who hold them, and cannot donate one
    memory twice. Arrays are compared by where they lie: jax.device_put and astype may return
    another array in the same memory.
    """
    held = {place for leaf in jax.tree.leaves(others) for place in _places(leaf)}

    def own(leaf: Any) -> Any:
        places = _places(leaf)
        if places & held:
            return jnp.copy(leaf)
        held.update(places)
        return leaf

    return jax.tree.map(own, state)


def _places(leaf: Any) -> set[tuple[int, int]]:
    """List where the parts of an array lie: (device, address); nothing for arrays of the host."""
    if not isinstance(leaf, jax.Array) or not leaf.size:
        return set()
    return {(s.device.id, s.data.unsafe_buffer_pointer()) for s in leaf.addressable_shards}


def strengthen(tree: PyTree, like: PyTree = None) -> PyTree:
    """Give values strong types, in the dtypes of `like` (default: their own).

    A weak type or another dtype in a returned state would make the next step compile again.
    """
    like = tree if like is None else like
    return jax.tree.map(
        lambda leaf, old: jax.lax.convert_element_type(leaf, jnp.result_type(old)), tree, like
    )
