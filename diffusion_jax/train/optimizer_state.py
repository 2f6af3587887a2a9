"""What the state of an optimizer holds of the parameters: where they began, and what is evaluated.

Some optimizers keep a copy of the first parameters (prodigy, madgrad, cocob, dog, dowg), and
schedule-free ones train at one place and are evaluated at another.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from diffusion_jax.types import PyTree

# Fields of the states of optax.contrib that begin as a copy of the parameters. The distance that
# dog begins with, 1e-6 of their norm, stays the one of the first: it is a guess either way.
_COPIES = ("z", "params0", "x0", "init_particles", "init_params")


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


def restarted(opt_state: PyTree, params: PyTree) -> PyTree:
    """Let an initial state begin from other parameters: they take the place of copies of the first.

    For parameters that were loaded after the state was made. A copy may be of a part of the
    parameters: of some of their names, or of what lies under one of them.
    """

    def restart(node: Any) -> Any:
        if not _is_state(node):
            return node
        fields = {
            name: _copies(getattr(node, name), params) for name in _COPIES if name in node._fields
        }
        return node._replace(**fields)

    return jax.tree.map(restart, opt_state, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    fields = getattr(node, "_fields", ())
    module = type(node).__module__
    return module.startswith("optax.contrib") and any(name in fields for name in _COPIES)


def _copies(old: PyTree, params: PyTree) -> PyTree:
    """Copy the parameters that an old copy was of, in its dtypes."""
    if isinstance(old, Mapping):
        names = set(old)
        parts = (params, *(part for part in params.values() if isinstance(part, Mapping)))
        whole = next(part for part in parts if names <= set(part))
        params = {name: whole[name] for name in old}
    # A real copy: a buffer that the state held twice could not be donated.
    return jax.tree.map(
        lambda leaf, like: (
            like
            if isinstance(like, optax.MaskedNode)
            else jnp.array(leaf, dtype=like.dtype, copy=True)
        ),
        params,
        old,
    )
