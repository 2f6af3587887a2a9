"""Losses of a state on a whole split, with raw and with averaged weights; bits per dimension."""

import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.data.batches import Batches
from diffusion_jax.data.progress import log_progress
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.scoring import Levels
from diffusion_jax.runs.beginning.start import open_run
from diffusion_jax.runs.measuring.levels import BITS, build_evaluate_levels, level_lines
from diffusion_jax.runs.measuring.likelihood import has_likelihood
from diffusion_jax.runs.weights import run_frozen
from diffusion_jax.train.checkpoints.saving import restore_state
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.step import mean_metrics
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted


class Evaluation(NamedTuple):
    """What a run's checkpoint came to on a split: its step, the number of records, the losses.

    bits: bounds on the bits per dimension of the first bits_images images, by the names of
    levels.build_evaluate_levels, None where they are not defined. levels: losses by noise level;
    None where the model does not denoise.
    """

    step: int
    num_examples: int
    losses: dict[str, float]
    bits: dict[str, float] | None
    bits_images: int
    levels: dict[str, float] | None = None


def evaluate_run(
    workdir: str | os.PathLike,
    split: str = "test",
    *,
    step: int | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    bits_images: int = 16,
) -> Evaluation:
    """Compute the losses of a run's checkpoint on a split of its data.

    step: the newest checkpoint by default. bits_images: for how many images the bits per dimension
    of a pixel model are bounded, one network call for each of them and each timestep; 0 for none.
    Raises FileNotFoundError when there is no such run or checkpoint, ValueError for a split that
    the config does not have.
    """
    workdir = pathlib.Path(workdir)
    experiment, _ = open_run(workdir, overrides, step)
    batches = _shown(experiment.eval_batches(split), f"evaluating {split}")
    frozen = run_frozen(experiment, workdir)
    state, _ = restore_state(workdir / "checkpoints", experiment.abstract_state(), step)
    losses = build_evaluate(experiment, frozen, batches, prefix=split)(state)
    levels = bits = None
    if experiment.task.drawing is not None:
        options = Levels(bits_images=bits_images if has_likelihood(experiment) else 0)
        levels = build_evaluate_levels(experiment, frozen, batches, options)(state)
        bits = {name: levels.pop(name) for name in list(levels) if name.startswith(BITS)} or None
    return Evaluation(int(state.step), batches.num_examples, losses, bits, bits_images, levels)


def evaluation_lines(found: Evaluation, split: str) -> list[str]:
    """Lay out an evaluation: its step and records, then a line for each loss and number."""
    lines = [f"step {found.step}, {counted(found.num_examples, 'record', 'records')} of {split}:"]
    lines += [f"  {name:32} {value:.6g}" for name, value in sorted(found.losses.items())]
    lines += [f"  {line}" for line in level_lines(found.levels or {})]
    count = min(found.bits_images, found.num_examples)
    for end in ("", "_ema"):
        if found.bits is not None and f"{BITS}{end}" in found.bits:
            bits, half = found.bits[f"{BITS}{end}"], found.bits[f"{BITS}_ci{end}"]
            over = f"at most, over the first {count} images (± {half:.2g})"
            lines.append(f"  {f'{split}/bits_per_dim{end}':32} {bits:.4f}, {over}")
    return lines


def _shown(batches: Batches, doing: str) -> Batches:
    """Tell how far the reading of batches is, whoever reads them."""
    count = batches.steps_per_epoch
    return batches._replace(iterate=lambda step: log_progress(batches.iterate(step), count, doing))


def build_evaluate(
    experiment: Experiment,
    frozen: PyTree,
    batches: Batches,
    *,
    prefix: str,
    num_batches: int | None = None,
) -> Callable[[TrainState], dict[str, float]]:
    """Make evaluate(state) -> {"val/loss_simple": ..., "val/loss_simple_ema": ...}.

    It makes one pass over the batches.

    The noise of a batch depends on its number only, so two evaluations differ by the weights
    alone. prefix is the part before the slash; num_batches stops early (default: the whole split).
    """
    losses = build_losses(experiment, frozen, batches, prefix=prefix, num_batches=num_batches)

    def evaluate(state: TrainState) -> dict[str, Any]:
        scalars = losses(state.params, state.mutable)
        if has_ema(state.opt_state):
            averaged = losses(experiment.task.averaged(state), state.mutable)
            scalars |= {f"{name}_ema": value for name, value in averaged.items()}
        return scalars

    return evaluate


def build_losses(
    experiment: Experiment,
    frozen: PyTree,
    batches: Batches,
    *,
    prefix: str,
    num_batches: int | None = None,
) -> Callable[[PyTree, PyTree], dict[str, float]]:
    """Make losses(params, mutable) -> {"val/loss_simple": ...}, see build_evaluate."""
    eval_step = jax.jit(experiment.task.eval_step)

    def losses(params: PyTree, mutable: PyTree) -> dict[str, float]:
        found = []
        for number, batch in enumerate(itertools.islice(batches.iterate(0), num_batches)):
            found.append(eval_step(params, mutable, frozen, experiment.to_devices(batch), number))
        return {f"{prefix}/{name}": value for name, value in mean_metrics(found).items()}

    return losses
