"""Losses of a state on a whole split, with raw and with averaged weights."""

import itertools
from collections.abc import Callable
from typing import Any

import jax

from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.step import mean_metrics
from diffusion_jax.types import PyTree


def build_evaluate(
    experiment: Experiment,
    frozen: PyTree,
    batches: Batches,
    *,
    prefix: str,
    num_batches: int | None = None,
) -> Callable[[TrainState], dict[str, float]]:
    """Make evaluate(state) -> {"val/loss_simple": ..., "val/loss_simple_ema": ...} over one pass
    of batches.

    The noise of a batch depends on its number only, so two evaluations differ by the weights
    alone. prefix is the part before the slash; num_batches stops early (default: the whole split).
    """
    eval_step = jax.jit(experiment.eval_step)

    def losses(params: PyTree, state: TrainState) -> dict[str, float]:
        found = []
        for number, batch in enumerate(itertools.islice(batches.iterate(0), num_batches)):
            found.append(
                eval_step(params, state.mutable, frozen, experiment.to_devices(batch), number)
            )
        return mean_metrics(found)

    def evaluate(state: TrainState) -> dict[str, Any]:
        scalars = {f"{prefix}/{name}": value for name, value in losses(state.params, state).items()}
        if has_ema(state.opt_state):
            averaged = losses(experiment.task.averaged(state), state)
            scalars |= {f"{prefix}/{name}_ema": value for name, value in averaged.items()}
        return scalars

    return evaluate
