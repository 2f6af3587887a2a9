"""What the state of an optimizer holds of the parameters: where they began, and what is evaluated.

Some optimizers keep a copy of the first parameters (prodigy, madgrad, cocob, dog, dowg) or begin
with a distance in proportion to their norm (dog), and schedule-free ones train at one place and are
evaluated at another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.interpreters import partial_eval

from diffusion_jax.types import PyTree


def is_schedule_free(name: str) -> bool:
    """Tell by its name whether an optimizer evaluates other parameters than it trains."""
    return name.startswith("schedule_free")


def evaluation_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """Return what is evaluated: of a schedule-free optimizer x, of any other the parameters.

    Parameters that are not trained, see optimizer.trainable_mask, stay as they are.
    Source: Defazio et al. 2024, "The Road Less Scheduled"; optax.contrib.schedule_free_eval_params.
    """
    is_state = lambda node: isinstance(node, optax.contrib.ScheduleFreeState)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if not found:
        return params
    (state,) = found
    return jax.tree.map(
        lambda y, z: (
            y if isinstance(z, optax.MaskedNode) else (y - (1.0 - state.b1) * z) / state.b1
        ),
        params,
        state.z,
    )


def averaging_evaluated(
    chain: optax.GradientTransformation,
    averages: Sequence[tuple[str, optax.GradientTransformation]],
) -> optax.GradientTransformationExtraArgs:
    """Add averages to a chain with the link "optimizer" that follow what is evaluated.

    averages: name -> a transformation that leaves the updates as they are and averages the
    parameters. The state is a dictionary, as of a chain to which they were added as links.
    """
    chain = optax.with_extra_args_support(chain)

    def init(params: PyTree) -> dict[str, Any]:
        state: Any = chain.init(params)
        return {**state, **{name: average.init(params) for name, average in averages}}

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, dict[str, Any]]:
        own = {name: state[name] for name in state if name not in dict(averages)}
        new: Any
        updates, new = chain.update(updates, own, params, **extra)
        evaluated = evaluation_params(new["optimizer"], optax.apply_updates(params, updates))
        still = jax.tree.map(jnp.zeros_like, evaluated)
        for name, average in averages:
            new = {**new, name: average.update(still, state[name], evaluated)[1]}
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)


def restarted(opt_state: PyTree, params: PyTree, init: Callable[[PyTree], PyTree]) -> PyTree:
    """Let an initial state begin from other parameters: what it holds of the first is of these.

    For parameters that were loaded after the state was made. init: params -> the state that they
    begin with, which opt_state was made by. Only what depends on the values of the parameters
    (copies, averages, their norm) is computed, so that moments do not lie in memory twice.
    """
    leaves, structure = jax.tree.flatten(opt_state)
    if not leaves:
        return opt_state
    traced = jax.make_jaxpr(init)(params)
    moves = _depending(traced.jaxpr)
    old = [leaf for leaf, moved in zip(leaves, moves, strict=True) if moved]
    if not old:
        return opt_state
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, moves, instantiate=True)
    computed = jaxpr_as_fun(ClosedJaxpr(needed, traced.consts))

    def begin(params: PyTree) -> list[jax.Array]:
        # Real copies: a buffer that the state held twice could not be donated.
        pairs = zip(computed(*jax.tree.leaves(params)), old, strict=True)
        return [jnp.array(leaf, dtype=like.dtype, copy=True) for leaf, like in pairs]

    shardings = [leaf.sharding for leaf in old]
    new = iter(jax.jit(begin, out_shardings=shardings)(params))
    pairs = zip(leaves, moves, strict=True)
    return jax.tree.unflatten(structure, [next(new) if moved else leaf for leaf, moved in pairs])


def _depending(whole: Jaxpr) -> list[bool]:
    """Find which results of a traced function depend on the values of its arguments."""
    # Without what is not used: zeros_like reads a shape, and no value.
    jaxpr, _ = partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars), instantiate=True)
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if not reached.isdisjoint(v for v in equation.invars if not isinstance(v, Literal)):
            reached.update(equation.outvars)
    return [not isinstance(out, Literal) and out in reached for out in jaxpr.outvars]
