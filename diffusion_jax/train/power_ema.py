"""Averages of the parameters whose length is chosen after training: power-function averages.

An average of exponent gamma after t updates weighs the parameters of update s by about s^gamma: its
length is a share of the training so far, not a number of steps. The length of a profile is its
standard deviation over t, sigma_rel. A few such averages (tracks) are updated in every step, and
snapshots of one of them are kept; any other length is a weighted sum of them.

Source: Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models,
section 3 and appendix C.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.types import PyTree

# The largest length of an exponent of 0, the plain mean over all updates, is 1 / sqrt(12).
LARGEST_LENGTH = 0.28
# Relative error of a number that is kept in float32, and of one in a snapshot, see pack.
EXACT, PACKED = 2.0**-24, 2.0**-12
# Snapshots lie so far apart: each at least so many times as late as the one before.
RUNG = 1.25


class PowerEmaState(NamedTuple):
    """The tracks, float32 trees like the parameters, and how many updates they have seen."""

    seen: jax.Array
    tracks: tuple[PyTree, ...]


class Profile(NamedTuple):
    """An average after `step` updates with weights proportional to s^exponent, s = 1 ... step.

    error: the relative error of its numbers.
    """

    step: int
    exponent: float
    error: float = EXACT


def power_ema(lengths: Sequence[float]) -> optax.GradientTransformation:
    """Average the parameters, one track a length: shadow <- beta shadow + (1 - beta) params.

    beta = (1 - 1/t)^(gamma + 1), with t the number of the update from 1, so that the initial
    parameters have no weight. Updates pass unchanged. The transformation belongs at the end of its
    chain, because it averages `params + updates`. Tracks are float32 whatever the parameters are:
    bfloat16 would not move by the small steps of a late update.

    Raises ValueError for lengths that are not ascending, fewer than two or out of range.
    """
    check_lengths(lengths)
    exponents = [exponent_of(length) for length in lengths]

    def init(params: PyTree) -> PowerEmaState:
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)  # noqa: E731
        return PowerEmaState(jnp.zeros((), jnp.int32), tuple(zeros() for _ in exponents))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, PowerEmaState]:
        if params is None:
            raise ValueError("power_ema needs the parameters: call update(updates, state, params)")
        seen = state.seen + 1
        new = optax.apply_updates(params, updates)

        def averaged(track: PyTree, exponent: float) -> PyTree:
            # 1 - (1 - 1/t)^(gamma + 1), written without the cancellation
            rate = -jnp.expm1((exponent + 1.0) * jnp.log1p(-1.0 / seen.astype(jnp.float32)))
            return jax.tree.map(
                lambda shadow, leaf: shadow + rate * (leaf.astype(jnp.float32) - shadow), track, new
            )

        tracks = zip(state.tracks, exponents, strict=True)
        return updates, PowerEmaState(seen, tuple(averaged(*track) for track in tracks))

    return optax.GradientTransformation(init, update)


def check_lengths(lengths: Sequence[float]) -> None:
    """Raise ValueError unless these are two or more lengths, ascending and in range."""
    for length in lengths:
        exponent_of(length)
    if len(lengths) < 2 or any(b <= a for a, b in zip(lengths, lengths[1:], strict=False)):
        raise ValueError(f"ema.power = {tuple(lengths)} should be two or more lengths, ascending")


def exponent_of(length: float) -> float:
    """Return the exponent gamma of a length sigma_rel = sqrt((g + 1) / ((g + 2)^2 (g + 3))).

    Raises ValueError unless 0 < length <= LARGEST_LENGTH.
    """
    if not 0.0 < length <= LARGEST_LENGTH:
        raise ValueError(
            f"length = {length} should be above 0 and at most {LARGEST_LENGTH}: it is a share of "
            "the training so far"
        )
    # (g + 2)^2 (g + 3) - (g + 1) / sigma^2 = 0; two roots have averages, the larger one peaks late
    inverse = length**-2.0
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def find_tracks(opt_state: PyTree) -> PowerEmaState | None:
    """Find the tracks in an optimizer state, or its abstract form; None where there are none."""
    is_state = lambda node: isinstance(node, PowerEmaState)  # noqa: E731
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    return found[0] if found else None


def fit(kept: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """Find the weights with which the kept averages sum to the target -> (weights, distance).

    The least squares of the difference of the profiles, with weights that sum to 1, so that
    parameters that stand still are met exactly. Errors of the kept numbers count as well, or large
    weights of opposite signs would amplify them. distance: the norm of the difference over the norm
    of the target, 0 where it is met; in units of how much the parameters move.
    """
    norm = _products([target], [target])[0, 0]
    gram = _products(kept, kept) / norm
    right = _products(kept, [target])[:, 0] / norm
    n = len(kept)
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = gram + np.diag([profile.error**2 for profile in kept])
    system[n, n] = 0.0
    weights = np.linalg.solve(system, np.append(right, 1.0))[:n]
    square = weights @ gram @ weights - 2.0 * weights @ right + 1.0
    return weights, float(np.sqrt(max(square, 0.0)))


def _products(left: Sequence[Profile], right: Sequence[Profile]) -> np.ndarray:
    """Integrate the products of profiles (g + 1) s^g / t^(g + 1), 0 after t, over s."""
    t, g = (np.array([p[i] for p in left], np.float64)[:, None] for i in (0, 1))
    u, h = (np.array([p[i] for p in right], np.float64)[None] for i in (0, 1))
    end = np.minimum(t, u)
    power = g * np.log(end / t) + h * np.log(end / u)
    return (g + 1) * (h + 1) / (g + h + 1) * np.exp(power) * end / (t * u)


def is_snapshot_step(step: int, every: int) -> bool:
    """Tell whether a snapshot is due: at multiples of `every`, the first behind a power of RUNG."""
    before = step - every
    return step % every == 0 and (before < 1 or _rung(step) > _rung(before))


def _rung(step: int) -> int:
    return math.floor(math.log(step) / math.log(RUNG))


def pack(track: PyTree) -> PyTree:
    """Round a track to float16, two bytes a number -> {"values", "scales"}, trees like the track.

    A leaf is divided by a power of two near its largest number, so that none overflows. Numbers
    keep 11 bits, a relative error of 2^-12 in the mean; below 2^-14 of the largest they keep fewer.
    """
    scales = jax.tree.map(_scale, track)
    return {"values": jax.tree.map(_divided, track, scales), "scales": scales}


def unpack(packed: PyTree) -> PyTree:
    """Return what `pack` was given, as far as float16 keeps it, in float32."""
    return jax.tree.map(_multiplied, packed["values"], packed["scales"])


# One small program per shape compiles faster than one for all leaves of a network.
@jax.jit
def _scale(leaf: Any) -> Any:
    _, power = jnp.frexp(jnp.max(jnp.abs(leaf), initial=0.0))
    return jnp.ldexp(jnp.float32(1.0), power)


@jax.jit
def _divided(leaf: Any, scale: Any) -> Any:
    return (leaf / scale).astype(jnp.float16)


@jax.jit
def _multiplied(value: Any, scale: Any) -> Any:
    return value.astype(jnp.float32) * scale
