"""Losses of a state on a whole split, with raw and with averaged weights; bits per dimension."""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.data.batches import Batches
from diffusion_jax.data.progress import log_progress
from diffusion_jax.devices.arrays import put
from diffusion_jax.devices.mesh import batch_sharding, batch_shards, on_mesh, replicated
from diffusion_jax.diffusion.vlb import bits_per_dim
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.scoring import Levels
from diffusion_jax.randomness import Stream, sample_keys, stream_key
from diffusion_jax.runs.levels import build_evaluate_levels
from diffusion_jax.runs.start import open_run
from diffusion_jax.runs.weights import run_frozen
from diffusion_jax.train.checkpoints.saving import restore_state
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.step import mean_metrics
from diffusion_jax.types import PyTree


class Evaluation(NamedTuple):
    """What a run's checkpoint came to on a split: its step, the number of records, the losses.

    bits: the bound on bits per dimension of the first bits_images images, or None. levels: losses
    by noise level, see levels.build_evaluate_levels; None where the model does not denoise.
    """

    step: int
    num_examples: int
    losses: dict[str, float]
    bits: float | None
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
    levels = None
    if experiment.task.drawing is not None:
        levels = build_evaluate_levels(experiment, frozen, batches, Levels())(state)
    bits = None
    if bits_images > 0 and has_likelihood(experiment):
        params = experiment.task.averaged(state) if has_ema(state.opt_state) else state.params
        bits = mean_bits(experiment, params, frozen, batches, bits_images)
    return Evaluation(int(state.step), batches.num_examples, losses, bits, bits_images, levels)


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
    eval_step = jax.jit(experiment.task.eval_step)

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


def has_likelihood(experiment: Experiment) -> bool:
    """Tell whether bits per dimension are defined: pixels, and a network on the timesteps."""
    drawing = experiment.task.drawing
    if drawing is None or drawing.network.first_stage is not None:
        return False
    return drawing.noise.on_timesteps


def mean_bits(
    experiment: Experiment, params: PyTree, frozen: PyTree, batches: Batches, count: int
) -> float:
    """Bound the mean bits per dimension of the first `count` images of a split from above.

    One evaluation of the network for each image and timestep, with its own conditions.
    Source: Ho et al. 2020, equation 5.
    """
    network, noise, mesh = experiment.network, experiment.drawing.noise, experiment.mesh

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def bound(params: PyTree, frozen: PyTree, batch: dict[str, jax.Array], keys: jax.Array) -> Any:
        conditioning = network.embed(params, frozen, network.with_conditioning_frame(batch, keys))
        found = bits_per_dim(
            frozen["schedule"],
            lambda x, t: network.apply(params, x, t, conditioning),
            batch["image"],
            keys,
            parameterization=noise.parameterization,
        )
        return found.total

    names = ("image", *sorted({e.input_key for e in network.embedders.values()}))
    key = stream_key(experiment.seed, Stream.LIKELIHOOD)
    bits: list[float] = []
    for batch in batches.iterate(0):
        real = np.flatnonzero(batch["weight"])[: count - len(bits)]
        keys = sample_keys(key, jnp.arange(len(bits), len(bits) + len(real)))
        rows = np.pad(np.arange(len(real)), (0, -len(real) % batch_shards(mesh)), mode="edge")
        given = [name for name in names if name in batch]
        chosen = {name: np.asarray(batch[name])[real[rows]] for name in given}
        arguments = put((chosen, keys[rows]), batch_sharding(mesh))
        bits += np.asarray(bound(params, frozen, *arguments))[: len(real)].tolist()
        if len(bits) >= count:
            break
    return float(np.mean(bits))
