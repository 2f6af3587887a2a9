"""What watches a run, in the order in which it acts."""

import collections
import io
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment.config.binding import value_of
from diffusion_jax.experiment.config.options import PromptOptions
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.scoring import Levels, ScoringOptions
from diffusion_jax.runs.drawing.prompt_pictures import SPLIT, build_prompts
from diffusion_jax.runs.measuring.evaluation import build_evaluate
from diffusion_jax.runs.measuring.levels import build_evaluate_levels, level_lines
from diffusion_jax.runs.measuring.scoring import FOLDER, build_score
from diffusion_jax.runs.measuring.speed import build_speed
from diffusion_jax.train.checkpoints.saving import Checkpoints
from diffusion_jax.train.ema import has_ema
from diffusion_jax.train.hooks.checkpoint import checkpoint
from diffusion_jax.train.hooks.early_stopping import early_stopping
from diffusion_jax.train.hooks.images import images
from diffusion_jax.train.hooks.levels import levels
from diffusion_jax.train.hooks.metrics import metrics
from diffusion_jax.train.hooks.nan_stop import nan_stop
from diffusion_jax.train.hooks.profiler import profiler
from diffusion_jax.train.hooks.progress import progress
from diffusion_jax.train.hooks.scalars import Speed, scalars
from diffusion_jax.train.hooks.signals import signal_hook
from diffusion_jax.train.hooks.snapshots import FOLDER as SNAPSHOTS
from diffusion_jax.train.hooks.snapshots import snapshots
from diffusion_jax.train.hooks.validation import Scores, validation
from diffusion_jax.train.loop import Hook
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree


class Watched(NamedTuple):
    """What the hooks of a run look at and write to.

    progress: where the progress line goes, None for nowhere.
    with_images: (batch, n) -> its first n rows with images, when batches of training have none.
    """

    workdir: pathlib.Path
    writer: Writer
    checkpoints: Checkpoints
    metadata: Mapping[str, Any]
    scores: Scores
    frozen: PyTree
    validation_batches: Batches | None
    class_names: tuple[str, ...]
    signals: collections.deque[int]
    hang: Hook
    progress: io.TextIOBase | None = None
    with_images: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None


def build_hooks(experiment: Experiment, watched: Watched) -> list[Hook]:
    """Make the hooks in their order: speak, measure, show, validate, decide, save."""
    options, writer, scores = experiment.hooks, watched.writer, watched.scores
    speed = build_speed(experiment)
    make: dict[str, Callable[..., Hook | list[Hook]]] = {
        "hang": lambda o: watched.hang,
        "nan_stop": lambda o: nan_stop(checkpoints=watched.checkpoints, **o),
        "progress": lambda o: _progress(experiment, watched, speed, o),
        "scalars": lambda o: scalars(writer, lr_at=experiment.task.lr_at, speed=speed, **o),
        "profiler": lambda o: profiler(watched.workdir / "profile", **o),
        "images": lambda o, pictures: _images(experiment, watched, o, pictures),
        "prompts": lambda o: _prompts(experiment, watched, o),
        "validation": lambda o, passes: _validation(experiment, watched, o, passes),
        "levels": lambda o, chosen: _levels(experiment, watched, o, chosen),
        "metrics": lambda o, scoring: _metrics(experiment, watched, o, scoring),
        "early_stopping": lambda o: early_stopping(scores, **o),
    }
    hooks = [
        hook
        for name in make
        if name in options.hooks
        for hook in _as_list(make[name](*options.hooks[name]))
    ]
    saving = checkpoint(
        watched.checkpoints, watched.metadata, scores=scores, writer=writer, **options.checkpoint
    )
    kept, averages = experiment.ema, []
    if kept.power:
        place = watched.workdir / SNAPSHOTS
        averages = [snapshots(place, count=kept.snapshots, every=kept.snapshot_every)]
    # A signal saves behind validation, so that a score of the same step is not lost.
    (signal_options,) = options.hooks["signals"]
    signals = signal_hook(watched.signals, saving.end, **signal_options)
    return [*hooks, *averages, signals, saving]


def _progress(
    experiment: Experiment, watched: Watched, speed: Speed, options: dict[str, Any]
) -> list[Hook]:
    if watched.progress is None:
        return []
    checkpoints = experiment.hooks.checkpoints
    shared = {
        "num_steps": experiment.training.num_steps,
        "speed": speed,
        "stream": watched.progress,
        "lr_at": experiment.task.lr_at,
        "scores": watched.scores,
        "monitor": checkpoints["monitor"] if "monitor" in checkpoints else None,
    }
    return [progress(**shared, **options)]


def _as_list(hooks: Hook | list[Hook]) -> list[Hook]:
    return [hooks] if isinstance(hooks, Hook) else hooks


def _images(
    experiment: Experiment, watched: Watched, options: dict[str, Any], pictures: dict[str, Any]
) -> list[Hook]:
    """Show batches of training and, always the same, the first of validation."""
    count, with_images = value_of(images, options, "max_images"), watched.with_images
    log_images = experiment.task.pictures(
        watched.frozen,
        class_names=watched.class_names,
        max_images=count,
        **pictures,
    )
    shown = log_images
    if with_images is not None:
        shown = lambda state, batch: log_images(state, with_images(batch, count))  # noqa: E731
    hooks = [images(shown, watched.writer, **options)]
    if watched.validation_batches is not None:
        first = next(watched.validation_batches.iterate(0))
        hooks.append(images(log_images, watched.writer, split="val", batch=first, **options))
    return hooks


def _prompts(experiment: Experiment, watched: Watched, options: dict[str, Any]) -> Hook:
    asked = PromptOptions(**options)
    return images(
        build_prompts(experiment, watched.frozen, watched.class_names, asked),
        watched.writer,
        split=SPLIT,
        batch_frequency=asked.every,
        max_images=len(asked.prompts),
        increase_log_steps=False,
        batch={},
    )


def _validation(
    experiment: Experiment, watched: Watched, options: dict[str, Any], passes: dict[str, Any]
) -> Hook:
    assert watched.validation_batches is not None  # bind_hooks asks for the split
    evaluate = build_evaluate(
        experiment, watched.frozen, watched.validation_batches, prefix="val", **passes
    )
    return validation(evaluate, watched.writer, watched.scores, **options)


def _metrics(
    experiment: Experiment, watched: Watched, options: dict[str, Any], scoring: dict[str, Any]
) -> Hook:
    score = build_score(
        experiment, watched.frozen, ScoringOptions(**scoring), watched.workdir / FOLDER
    )

    def of_averages(state: TrainState) -> dict[str, float]:
        has = has_ema(state.opt_state)
        return score(experiment.task.averaged(state) if has else state.params)

    return metrics(of_averages, watched.writer, watched.scores, **options)


def _levels(
    experiment: Experiment, watched: Watched, options: dict[str, Any], chosen: dict[str, Any]
) -> Hook:
    assert watched.validation_batches is not None  # bind_hooks asks for the split
    evaluate = build_evaluate_levels(
        experiment, watched.frozen, watched.validation_batches, Levels(**chosen)
    )
    return levels(evaluate, level_lines, watched.writer, **options)
