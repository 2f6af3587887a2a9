"""Metrics of the samples of a model: draw, extract, compare with the data, keep the statistics."""

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.data.images import ImageOptions
from diffusion_jax.data.progress import log_progress
from diffusion_jax.devices.arrays import shard_batch
from diffusion_jax.devices.mesh import batch_shards
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.network.frames import FRAME, FRAME_INPUTS, frame_of
from diffusion_jax.experiment.scoring import (
    ScoringOptions,
    check_scoring,
    make_extractor,
    make_texts,
)
from diffusion_jax.metrics.extraction import (
    Extract,
    Extractor,
    build_extract,
    stream_all,
    to_levels,
)
from diffusion_jax.metrics.scores import (
    METRICS,
    check_count,
    clip_scores,
    compute_scores,
    find_metrics,
)
from diffusion_jax.metrics.statistics import Statistic, entropies, mean
from diffusion_jax.metrics.summaries import (
    Summary,
    load_summary,
    save_npz,
    save_summary,
    summary,
)
from diffusion_jax.models.first_stage.lpips import load_lpips, lpips
from diffusion_jax.randomness import Stream, sample_keys, stream_key
from diffusion_jax.runs.beginning.start import open_run
from diffusion_jax.runs.weights import load_trained_params, run_frozen
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.pictures import to_pixels
from diffusion_jax.types import PyTree

_log = logging.getLogger(__name__)
FOLDER = "statistics"
# Images of a device that are looked at together.
_ROWS = 32
# Options of batches that change no image of a split.
_SILENT = ("cache", "max_corrupt", "label_key", "caption_key")
# (params, images=None) -> {name: value}, see build_score.
Score = Callable[..., dict[str, float]]


class Part(NamedTuple):
    """A stream over samples: what it is fed, and the number that it comes to.

    rows: (what was extracted, samples [b ...] in [-1, 1], their numbers) -> (rows, their numbers).
    """

    statistic: Statistic
    rows: Callable[[dict[str, np.ndarray], np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    number: Callable[[Any], Any]


def build_score(
    experiment: Experiment, frozen: PyTree, options: ScoringOptions, folder: pathlib.Path
) -> Score:
    """Make score(params, images=None) -> {"mind_dinov2": ..., ...}, metrics of drawn samples.

    Statistics of the data are computed once and kept in `folder`. The samples of every call are
    drawn from the same noise. They are appended to the list `images`, if one is given, as uint8
    [b h w c].
    Raises ValueError for what does not fit together, FileNotFoundError for a missing file.
    """
    check_scoring(options)
    extractor = make_extractor(options.features, options.weights)
    metrics = find_metrics(options.metrics, extractor.name)
    check_count(metrics, options.num_samples, extractor.width)
    extract = build_extract(extractor, experiment.mesh)
    training = data_summary(experiment, extractor, extract, "train", folder)
    reference = _reference(experiment, extractor, extract, options, folder, training)
    parts = _parts(extractor, metrics)
    if "clip_score" in metrics:
        captions = conditions(experiment, options.num_samples, ("caption",))["caption"]
        parts["clip_score"] = _clip_score(make_texts(options.weights)(captions.tolist()))
    read = {embedder.input_key for embedder in experiment.network.embedders.values()}
    frame = {FRAME} if read & {*FRAME_INPUTS} else set()
    names = sorted(read - {*FRAME_INPUTS} | frame)
    inputs = conditions(experiment, options.num_samples, names)

    def score(params: PyTree, images: list[np.ndarray] | None = None) -> dict[str, float]:
        states = {name: part.statistic.init() for name, part in parts.items()}
        for drawn, ids in draw_samples(experiment, params, frozen, inputs, options):
            found, _ = extract(drawn, ids)
            for name, part in parts.items():
                rows = part.rows(found, drawn, ids)
                states[name] = part.statistic.update(states[name], *rows)
            if images is not None:
                images.append(to_pixels(drawn[ids >= 0]))
        numbers = {
            name: part.number(part.statistic.result(states[name])) for name, part in parts.items()
        }
        compared = [metric for metric in metrics if metric in METRICS]
        return compute_scores(compared, numbers.pop("summary"), reference, training) | numbers

    return score


def _parts(extractor: Extractor, metrics: Sequence[str]) -> dict[str, Part]:
    parts = {
        "summary": Part(
            summary(extractor.name, extractor.key),
            lambda found, drawn, ids: (found["features"], ids),
            lambda result: result,
        )
    }
    if "inception_score" in metrics:
        parts["inception_score"] = Part(
            entropies(),
            lambda found, drawn, ids: (found["probabilities"], ids),
            lambda result: float(np.mean(result)),
        )
    if "lpips_diversity" in metrics:
        if extractor.of_videos:
            raise ValueError("metrics = 'lpips_diversity' compares images, and these are videos")
        params, distance = load_lpips(), jax.jit(lpips)

        def pairs(found: Any, drawn: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rgb = np.asarray(to_levels(jnp.asarray(drawn))) / 127.5 - 1.0
            both = np.where(ids[1::2] >= 0, ids[::2], -1)
            return np.asarray(distance(params, rgb[::2], rgb[1::2])), both

        parts["lpips_diversity"] = Part(mean(), pairs, lambda result: result[0])
    return parts


def _clip_score(texts: np.ndarray) -> Part:
    def rows(found: Any, drawn: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return clip_scores(found["features"], texts[np.maximum(ids, 0)]), ids

    return Part(mean(), rows, lambda result: result[0])


def conditions(experiment: Experiment, count: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Take what these names hold in the first `count` records in the order of training.

    Raises ValueError for a name that the data do not have.
    """
    if not names:
        return {}
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in experiment.train_batches(experiment.data.source("train")).iterate(0):
        batch = experiment.task.with_inputs(batch)
        if FRAME in names:
            batch = {**batch, FRAME: frame_of(batch, experiment.network.frame_place)}
        absent = [name for name in names if name not in batch]
        if absent:
            raise ValueError(
                f"the data set {experiment.data.name!r} has no {absent[0]}, which the metrics need"
            )
        rows = {name: np.asarray(batch[name]) for name in names}
        if jax.process_count() > 1:
            rows = multihost_utils.process_allgather(rows, tiled=True)
        for name in names:
            found[name].append(np.asarray(rows[name]))
        if sum(map(len, found[names[0]])) >= count:
            break
    return {name: np.concatenate(rows)[:count] for name, rows in found.items()}


def draw_samples(
    experiment: Experiment,
    params: PyTree,
    frozen: PyTree,
    inputs: Mapping[str, np.ndarray],
    options: ScoringOptions,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (samples [b h w c] in [-1, 1], their numbers), -1 where the last batch is padded."""
    shards = 2 * batch_shards(experiment.mesh)  # even, for pairs
    size = -(-min(options.batch_size, options.num_samples) // shards) * shards
    root = stream_key(experiment.seed, Stream.SCORED_SAMPLES)
    firsts = range(0, options.num_samples, size)
    for first in log_progress(firsts, options.num_samples, "drawing", size=lambda _: size):
        ids = np.arange(first, first + size)
        rows = np.minimum(ids, options.num_samples - 1)
        drawn = experiment.sample_fn(
            params,
            frozen,
            {name: values[rows] for name, values in inputs.items()},
            sample_keys(root, jnp.asarray(rows)),
            num_steps=options.num_steps,
            guidance_scale=options.guidance_scale,
        )
        yield jax.device_get(drawn.x), np.where(ids < options.num_samples, ids, -1)


def data_summary(
    experiment: Experiment,
    extractor: Extractor,
    extract: Extract,
    role: str,
    folder: pathlib.Path,
) -> Summary:
    """Summarise a split of the data, or read what an earlier call has kept in the folder."""
    data = _data_key(experiment, role)
    name = hashlib.sha256(f"{data} {extractor.key}".encode()).hexdigest()[:12]
    path = folder / f"{role}_{extractor.name}_{name}.npz"
    if _in_all_processes(path.is_file()):
        return load_summary(path, extractor.name, extractor.key, data)
    rows = batch_shards(experiment.mesh) * _ROWS
    source = experiment.data.source(role)
    batches = experiment.data.eval_batches(source, batch_size=rows)
    _log.info(
        "computing features of %d images (%s) with %s, once",
        batches.num_examples,
        role,
        extractor.name,
    )

    def on_mesh() -> Iterator[tuple[Any, Any]]:
        for batch in batches.iterate(0):
            ids = batch["index"].astype(np.int32)  # -1 for padding
            placed = shard_batch(experiment.mesh, {"image": batch["image"], "id": ids})
            yield placed["image"], placed["id"]

    found = stream_all(summary(extractor.name, extractor.key), extract, on_mesh())
    if jax.process_index() == 0:
        save_summary(path, found, data)
    return found


def _in_all_processes(answer: bool) -> bool:
    """Tell whether all processes say yes, so that none waits alone in a computation of all."""
    if jax.process_count() == 1:
        return answer
    return bool(np.all(multihost_utils.process_allgather(np.asarray(answer))))


def _reference(
    experiment: Experiment,
    extractor: Extractor,
    extract: Extract,
    options: ScoringOptions,
    folder: pathlib.Path,
    training: Summary,
) -> Summary:
    if options.reference is not None:
        path = pathlib.Path(os.path.expanduser(options.reference))
        return load_summary(path, extractor.name, extractor.key)
    if options.split == "train":
        return training
    return data_summary(experiment, extractor, extract, options.split, folder)


def _data_key(experiment: Experiment, role: str) -> str:
    """Describe the images of a split, so that other images have another key."""
    data = experiment.data
    names = [name for name in ImageOptions._fields if name not in _SILENT]
    chosen = {name: data.batch_options[name] for name in names}
    identity = {"data": data.fingerprint(data.source(role)), "split": data.splits[role], **chosen}
    return json.dumps(identity, sort_keys=True, default=str)


def save_samples(path: pathlib.Path, images: Sequence[np.ndarray]) -> None:
    """Write uint8 images [b h w c] as arr_0 of a .npz file, in RGB, as other tools read them."""
    pixels = np.concatenate(images)
    save_npz(path, {"arr_0": np.broadcast_to(pixels, (*pixels.shape[:-1], 3))})


def score_run(
    workdir: str | os.PathLike,
    options: ScoringOptions,
    *,
    step: int | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    samples: str | os.PathLike | None = None,
) -> dict[str, float]:
    """Compute metrics of samples of a run's checkpoint, drawn with its averages if it keeps them.

    step: the newest checkpoint by default. samples: a new .npz file for the samples, arr_0.
    Raises ValueError or FileNotFoundError for what does not fit together.
    """
    workdir = pathlib.Path(workdir)
    if samples is not None and pathlib.Path(samples).exists():
        raise ValueError(f"{samples} is already there; choose a new file for the samples")
    experiment, _ = open_run(workdir, overrides, step)
    experiment.drawing  # noqa: B018  a first stage draws nothing, which is said now
    frozen = run_frozen(experiment, workdir)
    score = build_score(experiment, frozen, options, workdir / FOLDER)
    averages = has_ema(experiment.abstract_state().opt_state)
    params = load_trained_params(experiment, workdir, step=step, ema=averages)
    images: list[np.ndarray] | None = None if samples is None else []
    found = score(params, images)
    if samples is not None and images is not None and jax.process_index() == 0:
        save_samples(pathlib.Path(samples), images)
    return found
