"""Averages of any length of what a run has trained, made after the fact from what it kept."""

import csv
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.data.whole_files import whole_file
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.scoring import ScoringOptions
from diffusion_jax.runs import folder
from diffusion_jax.runs.beginning.start import open_run
from diffusion_jax.runs.drawing.samples import check_empty
from diffusion_jax.runs.measuring.evaluation import build_losses
from diffusion_jax.runs.measuring.scoring import FOLDER as STATISTICS
from diffusion_jax.runs.measuring.scoring import build_score
from diffusion_jax.runs.weights import run_frozen, start_frozen
from diffusion_jax.train.checkpoints.reading import (
    load_metadata,
    load_track,
    restore_state,
    saved_steps,
)
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.ema import has_ema, reset_ema
from diffusion_jax.train.hooks.snapshots import FOLDER as SNAPSHOTS
from diffusion_jax.train.power_ema import (
    PACKED,
    Profile,
    exponent_of,
    find_tracks,
    fit,
    pack,
    unpack,
)
from diffusion_jax.types import PyTree

FOLDER = "ema"


class Average(NamedTuple):
    """An average of the trained part of the parameters, float32, and how well it was met.

    distance: between the profile of the length and the one that was met, as a share of the former;
    multiplied by how much the parameters still moved, it bounds their error.
    """

    params: PyTree
    distance: float


class Row(NamedTuple):
    """One line of a sweep: what was evaluated, its distance (see Average), and what it came to."""

    weights: str
    distance: float | None
    found: dict[str, float]


def average(
    experiment: Experiment, workdir: pathlib.Path, length: float, *, step: int | None = None
) -> Average:
    """Average what a run trained up to a checkpoint, over a share `length` of its updates.

    It is a weighted sum of the averages in the checkpoint and of the snapshots before it, read one
    after another. Raises ValueError when the run keeps no such averages or the length is out of
    range, FileNotFoundError when there is no such checkpoint.
    """
    lengths = experiment.ema.power
    if not lengths:
        raise ValueError(
            f"{workdir} keeps no averages of any length: config.ema.power = () should be two or "
            "more lengths, such as (0.05, 0.1), before training"
        )
    exponents = [exponent_of(each) for each in lengths]
    checkpoints, snapshots = workdir / "checkpoints", workdir / SNAPSHOTS
    target = exponent_of(length)
    steps = saved_steps(checkpoints)
    step = steps[-1] if step is None and steps else step
    updates = load_metadata(checkpoints, step=step)["next_batch"]
    before = [saved for saved in saved_steps(snapshots) if saved < updates]
    kept = [Profile(updates, exponent) for exponent in exponents]
    kept += [Profile(saved, exponents[-1], PACKED) for saved in before]
    weights, distance = fit(kept, Profile(updates, target))
    state = find_tracks(experiment.abstract_state().opt_state)
    assert state is not None  # the config says so
    like = state.tracks[0]

    def trees() -> Iterator[PyTree]:
        for number in range(len(exponents)):
            yield load_track(checkpoints, number, like, step=step)
        for saved in before:
            yield unpack(restore_state(snapshots, _packed_like(like), saved)[0])

    total = jax.tree.map(_zeros, like)
    for weight, tree in zip(weights.astype(np.float32), trees(), strict=True):
        total = jax.tree.map(functools.partial(_added, weight), total, tree)
    return Average(total, distance)


@jax.jit
def _added(weight: Any, total: Any, leaf: Any) -> Any:
    return total + weight * leaf


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _packed_like(like: PyTree) -> PyTree:
    """Describe a snapshot of a track, its numbers where the track's are."""
    shapes = jax.eval_shape(pack, like)
    values = jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own.sharding),
        shapes["values"],
        like,
    )
    return {"values": values, "scales": shapes["scales"]}


def write_average(
    workdir: str | os.PathLike,
    length: float,
    *,
    step: int | None = None,
    out: str | os.PathLike | None = None,
) -> tuple[pathlib.Path, Average]:
    """Write a run whose averages have another length -> (its folder, the average).

    It has one checkpoint, a copy of the run's in which this average replaces the run's own, or the
    parameters if the run keeps none. Every command that reads a run reads it.

    out: a new folder, by default workdir/ema/LENGTH_STEP. Raises as `average` does, and ValueError
    for a folder that is not empty.
    """
    workdir = pathlib.Path(workdir)
    experiment, _ = open_run(workdir, step=step)
    exponent_of(length)
    state, metadata = restore_state(workdir / "checkpoints", experiment.abstract_state(), step)
    step = int(state.step)
    to = workdir / FOLDER / f"{length:g}_{step}" if out is None else pathlib.Path(out)
    check_empty(to)
    found = average(experiment, workdir, length, step=step)
    if has_ema(state.opt_state):
        state = state._replace(opt_state=reset_ema(state.opt_state, found.params))
    else:
        state = state._replace(params=_replaced(state.params, found.params))
    to.mkdir(parents=True, exist_ok=True)
    start_frozen(experiment, to, run_frozen(experiment, workdir))
    checkpoints = open_checkpoints(to / "checkpoints", keep_last=1)
    checkpoints.save(step, state, {**metadata, "ema_length": length})
    checkpoints.close()
    record, source = folder.load_record(workdir), f"{workdir.absolute()}/checkpoints/{step}"
    folder.save_config(to, record.config, record.changes, source)
    return to, found


def _replaced(params: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Put averages in the place of what they average, in the dtypes of the parameters."""
    own = {name: params[name] for name in new}
    return {**params, **jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), dict(new), own)}


def sweep(
    workdir: str | os.PathLike,
    lengths: Sequence[float],
    split: str = "validation",
    *,
    step: int | None = None,
    scoring: ScoringOptions | None = None,
) -> Iterator[Row]:
    """Evaluate the raw weights, the run's own average and averages of several lengths, a Row each.

    split: of the losses. scoring: metrics of drawn samples besides, see runs.scoring; None for
    none. Raises as `average` and `evaluate_run` do.
    """
    workdir = pathlib.Path(workdir)
    for length in lengths:
        exponent_of(length)  # what is wrong should not wait for the others
    experiment, _ = open_run(workdir, step=step)
    frozen = run_frozen(experiment, workdir)
    losses = build_losses(experiment, frozen, experiment.eval_batches(split), prefix=split)
    score = None
    if scoring is not None:
        score = build_score(experiment, frozen, scoring, workdir / STATISTICS)
    state, _ = restore_state(workdir / "checkpoints", experiment.abstract_state(), step)
    steps = int(state.step)

    def row(weights: str, params: PyTree, distance: float | None = None) -> Row:
        found = losses(params, state.mutable)
        return Row(weights, distance, found | ({} if score is None else score(params)))

    yield row("raw", state.params)
    if has_ema(state.opt_state):
        yield row("ema", experiment.task.averaged(state))
    for length in lengths:
        params, distance = average(experiment, workdir, length, step=steps)
        yield row(f"{length:g}", _replaced(state.params, params), distance)


def sweep_lines(rows: Sequence[Row]) -> list[str]:
    """Lay out a sweep as a table."""
    names = list(rows[0].found)
    widths = [max(len(name), 9) for name in names]
    head = [f"{name:>{width}}" for name, width in zip(names, widths, strict=True)]
    lines = ["  ".join([f"{'length':8}", f"{'distance':>8}", *head])]
    for row in rows:
        distance = "" if row.distance is None else f"{row.distance:.3f}"
        numbers = [f"{row.found[n]:>{w}.5g}" for n, w in zip(names, widths, strict=True)]
        lines.append("  ".join([f"{row.weights:8}", f"{distance:>8}", *numbers]))
    return lines


def write_sweep(workdir: str | os.PathLike, found: Iterable[Row]) -> Iterator[str]:
    """Write a sweep to a file of the run, and give the lines of its table as they are found."""
    rows: list[Row] = []
    for row in found:
        rows.append(row)
        yield from sweep_lines(rows)[-1 if len(rows) > 1 else 0 :]
    path = pathlib.Path(workdir) / FOLDER / "sweep.csv"
    save_sweep(path, rows)
    yield f"wrote {path}"


def save_sweep(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Write a sweep as a CSV file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "distance", *rows[0].found])
        for row in rows:
            distance = "" if row.distance is None else row.distance
            writer.writerow([row.weights, distance, *row.found.values()])
