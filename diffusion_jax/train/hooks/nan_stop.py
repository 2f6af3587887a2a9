"""Stop when a metric is no longer a number."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.train.checkpoints.checksums import named_leaves
from diffusion_jax.train.checkpoints.saving import Checkpoints
from diffusion_jax.train.hooks.late import Interval, late
from diffusion_jax.train.loop import Hook, Stop
from diffusion_jax.types import PyTree


def nan_stop(*, every: int = 100, checkpoints: Checkpoints | None = None) -> Hook:
    """Make the hook; it belongs before the checkpoint hook, which only looks at what it saves.

    Every `every` steps it looks at all metrics since the last time. The Stop names the first step
    and metric that is NaN or infinite, and the newest checkpoint from before that step.
    """

    def check(interval: Interval) -> Stop | None:
        for step, metrics in zip(interval.steps, interval.metrics, strict=True):
            stop = metrics_stop(step, metrics, checkpoints)
            if stop is not None:
                return stop
        return None

    return late(check, every=every)


def metrics_stop(
    step: int, metrics: Mapping[str, Any], checkpoints: Checkpoints | None
) -> Stop | None:
    """Return a Stop without a save that names the first metric that is not finite, else None.

    metrics: scalars on the host.
    """
    for name, value in metrics.items():
        if not math.isfinite(float(value)):
            return _stop(f"{name} is {float(value)}", step, checkpoints)
    return None


def params_stop(step: int, params: PyTree, checkpoints: Checkpoints | None) -> Stop | None:
    """Return a Stop without a save that names the first parameter that is not finite, else None.

    The devices look, one small program per shape; the host waits for their answer.
    """
    leaves = named_leaves(params, "params/")
    with jax.transfer_guard("allow"):  # parameters may lie on the host
        answers = jax.device_get([_all_finite(leaf) for leaf in leaves.values()])
    for name, finite in zip(leaves, answers, strict=True):
        if not finite:
            return _stop(f"{name} is not finite", step, checkpoints)
    return None


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return jnp.asarray(True)
    return jnp.all(jnp.isfinite(leaf))


def _stop(what: str, step: int, checkpoints: Checkpoints | None) -> Stop:
    return Stop(f"{what} at step {step}{_last_good(checkpoints, step)}", save=False)


def _last_good(checkpoints: Checkpoints | None, step: int) -> str:
    if checkpoints is None:
        return ""
    earlier = [saved for saved in checkpoints.all_steps() if saved < step]
    if not earlier:
        return "; there is no checkpoint from before"
    return f"; the last checkpoint from before is {checkpoints.directory / str(earlier[-1])}"
