"""Exponential moving average of the parameters, as the last transformation of an optax chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.train.rounding import check_dtype, round_at_random
from diffusion_jax.types import PyTree


class EmaState(NamedTuple):
    """The averages (params, float32 or bfloat16) and how many updates they have seen.

    num_updates: int32 scalar, below 0 for a decay without warm-up: it stays -1, and averages in
    bfloat16 count down from it.
    """

    num_updates: jax.Array
    params: PyTree


def ema(
    decay: float = 0.9999, *, use_num_updates: bool = True, dtype: str = "float32"
) -> optax.GradientTransformation:
    """Average the parameters: shadow <- shadow - (1 - d)(shadow - params).

    d = min(decay, (1 + n) / (10 + n)), where n counts the updates, this one included: the first d
    is 2/11. Updates pass unchanged. The transformation must be the last of its chain, because it
    averages `params + updates`, the parameters after the step. The average starts at the initial
    parameters and has its own dtype, whatever theirs is.

    Args:
        decay: largest decay, in [0, 1]. 0 copies the parameters; with 1 the warm-up goes on for
            ever, and d comes close to 1 without reaching it.
        use_num_updates: False keeps the decay constant from the first update; a decay of 1 then
            keeps the initial parameters.
        dtype: of the average; "bfloat16" is rounded at random, up or down, and so follows a decay
            close to 1 in the mean, with noise in its last two or three bits.

    Raises:
        ValueError: `decay` lies outside [0, 1], the dtype is not in rounding.DTYPES, or update is
            called without `params`.

    Source: LitEma of latent-diffusion.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"ema decay = {decay} should be between 0 and 1")
    check_dtype("ema_dtype", dtype)

    def init(params: PyTree) -> EmaState:
        seen = jnp.asarray(0 if use_num_updates else -1, jnp.int32)
        return EmaState(seen, _shadow(params, dtype))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, EmaState]:
        if params is None:
            raise ValueError("ema needs the parameters: call update(updates, state, params)")
        warm = state.num_updates >= 0
        # What is rounded at random needs to know the step.
        still = state.num_updates if dtype == "float32" else state.num_updates - 1
        num_updates = jnp.where(warm, state.num_updates + 1, still)
        # 1 - (1 + n) / (10 + n), written without the cancellation
        warm_rate = jnp.where(warm, 9.0 / (10.0 + num_updates), 0.0)
        rate = jnp.maximum(jnp.float32(1.0 - decay), warm_rate)
        shadow = jax.tree.map(
            lambda average, new: average - rate * (average - new.astype(jnp.float32)),
            _in_float32(state.params),
            optax.apply_updates(params, updates),
        )
        if decay == 0.0:  # a copy to the last bit, which a difference of two is not
            shadow = _in_float32(optax.apply_updates(params, updates))
        return updates, EmaState(num_updates, round_at_random(shadow, dtype, num_updates))

    return optax.GradientTransformation(init, update)


class LateState(NamedTuple):
    """How many updates were seen, int32, and the average that may have seen fewer."""

    seen: jax.Array
    average: EmaState


def late(
    average: optax.GradientTransformation, *, start_step: int = 0, update_every: int = 1
) -> optax.GradientTransformation:
    """Let an average begin after start_step updates, and take every update_every-th from there on.

    Until then it is a copy of the parameters, and its warm-up begins with its first update.
    Raises ValueError for a start_step below 0 or an update_every below 1.
    """
    for name, value, least in (("start_step", start_step, 0), ("update_every", update_every, 1)):
        if value < least:
            raise ValueError(f"ema.{name} = {value} should be at least {least}")
    if (start_step, update_every) == (0, 1):
        return average

    def init(params: PyTree) -> LateState:
        state: Any = average.init(params)
        return LateState(jnp.zeros((), jnp.int32), state)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, LateState]:
        seen = state.seen + 1
        after: Any = average.update(updates, state.average, params)[1]
        new = optax.apply_updates(params, updates)
        due = (seen > start_step) & ((seen - start_step) % update_every == 0)

        def choose(old: Any, averaged: Any, new: Any) -> Any:
            kept = jnp.where(seen <= start_step, new.astype(old.dtype), old)
            return jnp.where(due, averaged, kept)

        shadow = jax.tree.map(choose, state.average.params, after.params, new)
        count = jnp.where(due, after.num_updates, state.average.num_updates)
        return updates, LateState(seen, EmaState(count, shadow))

    return optax.GradientTransformation(init, update)


def has_ema(opt_state: PyTree) -> bool:
    """Return whether the optimizer state holds an average."""
    return bool(_find(opt_state))


def ema_params(opt_state: PyTree) -> PyTree:
    """Return the averaged parameters, float32, in the structure of the parameters.

    Raises:
        ValueError: the optimizer keeps no average, or more than one.
    """
    found = _find(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} averages of the parameters and should hold "
            "1; make_optimizer(ema_decay=0.9999) adds one"
        )
    return _in_float32(found[0].params)


def averages_of(opt_state: PyTree) -> list[PyTree]:
    """List the averages in an optimizer state, or its abstract form, in the dtype they have."""
    return [node.params for node in _find(opt_state)]


def reset_ema(opt_state: PyTree, params: PyTree) -> PyTree:
    """Set the average in an optimizer state to `params`, and keep its count of updates.

    This is for parameters that were loaded after the state was made.
    """
    ema_params(opt_state)  # exactly one, or a sentence

    def reset(node: Any) -> Any:
        if not _is_ema(node):
            return node
        copies = jax.tree.map(lambda new, old: _shadow(new, old.dtype), params, node.params)
        return node._replace(params=copies)

    return jax.tree.map(reset, opt_state, is_leaf=_is_ema)


def _is_ema(node: object) -> bool:
    return isinstance(node, EmaState)


def _find(opt_state: PyTree) -> list[EmaState]:
    return [node for node in jax.tree.leaves(opt_state, is_leaf=_is_ema) if _is_ema(node)]


def _shadow(params: PyTree, dtype: Any) -> PyTree:
    # a real copy: a buffer that the state held twice could not be donated
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=dtype, copy=True), params)


def _in_float32(params: PyTree) -> PyTree:
    """Convert the leaves of another dtype; they may be abstract."""

    def convert(leaf: Any) -> Any:
        if leaf.dtype == jnp.float32:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
        return leaf.astype(jnp.float32)

    return jax.tree.map(convert, params)
