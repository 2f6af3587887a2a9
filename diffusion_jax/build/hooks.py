"""The `hooks` and `checkpoint` sections -> what watches a run, in the order in which it acts."""

import collections
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.build.autoencoding import is_first_stage
from diffusion_jax.build.binding import ConfigError, bind_shared, known_sections, value_of
from diffusion_jax.build.evaluation import build_evaluate
from diffusion_jax.build.experiment import Experiment
from diffusion_jax.build.images import build_log_images, build_log_reconstructions
from diffusion_jax.build.speed import build_speed
from diffusion_jax.data.batches import Batches
from diffusion_jax.train.checkpoint import Checkpoints, open_checkpoints
from diffusion_jax.train.hang import watch_hangs
from diffusion_jax.train.hooks.checkpoint import checkpoint
from diffusion_jax.train.hooks.early_stopping import early_stopping
from diffusion_jax.train.hooks.images import images
from diffusion_jax.train.hooks.nan_stop import nan_stop
from diffusion_jax.train.hooks.profiler import profiler
from diffusion_jax.train.hooks.progress import progress
from diffusion_jax.train.hooks.scalars import scalars
from diffusion_jax.train.hooks.validation import Scores, validation
from diffusion_jax.train.loop import Hook
from diffusion_jax.train.signals import signal_hook
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree

# Section -> the functions that its keys go to, each with what the run supplies.
_TARGETS: dict[str, tuple[tuple[Callable, tuple[str, ...]], ...]] = {
    "progress": ((progress, ("num_steps", "speed", "stream")),),
    "scalars": ((scalars, ("writer", "lr_at", "speed")),),
    "nan_stop": ((nan_stop, ("checkpoints",)),),
    "hang": ((watch_hangs, ()),),
    "signals": ((signal_hook, ("received", "save")),),
    "images": (),  # see _image_targets
    "validation": (
        (validation, ("evaluate", "writer", "scores")),
        (build_evaluate, ("experiment", "frozen", "batches", "prefix")),
    ),
    "early_stopping": ((early_stopping, ("scores",)),),
    "profiler": ((profiler, ("directory",)),),
}


def _image_targets(first_stage: bool) -> tuple[tuple[Callable, tuple[str, ...]], ...]:
    build = build_log_reconstructions if first_stage else build_log_images
    return (
        (images, ("log_images", "writer", "split", "batch")),
        (build, ("experiment", "frozen", "class_names", "max_images")),
    )


ALWAYS = ("progress", "scalars", "nan_stop", "hang", "signals")
_CHECKPOINT_TARGETS = (
    (checkpoint, ("checkpoints", "metadata", "scores", "writer")),
    (open_checkpoints, ("directory", "needed_bytes")),
)
DEFAULT_CHECKPOINT = {"every": 1000}


class HookOptions(NamedTuple):
    """Keywords of every hook that a config asks for, one dict a function, and of its
    checkpoints."""

    hooks: Mapping[str, list[dict[str, Any]]]
    checkpoint: dict[str, Any]
    checkpoints: dict[str, Any]


class Watched(NamedTuple):
    """What the hooks of a run look at and write to.

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
    with_images: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None


def bind_hooks(sections: Mapping[str, Any]) -> HookOptions:
    """Check the `hooks` and `checkpoint` sections; ConfigError names path, value and choices."""
    asked = sections["hooks"] if "hooks" in sections else {}
    known_sections(asked, _TARGETS, "config.hooks")
    asked = {name: {} for name in ALWAYS} | asked
    saving = sections["checkpoint"] if "checkpoint" in sections else DEFAULT_CHECKPOINT
    checkpoint_options, manager_options = bind_shared(
        saving, "config.checkpoint", *_CHECKPOINT_TARGETS
    )
    _check_monitors(sections, asked, manager_options)
    targets = _TARGETS | {"images": _image_targets(is_first_stage(sections))}
    return HookOptions(
        {
            name: bind_shared(section, f"config.hooks.{name}", *targets[name])
            for name, section in asked.items()
        },
        checkpoint_options,
        manager_options,
    )


def _check_monitors(
    sections: Mapping[str, Any], asked: Mapping[str, Any], manager: Mapping[str, Any]
) -> None:
    """Nothing may wait in silence for a validation that never comes."""
    splits = sections["data"]["splits"] if "splits" in sections["data"] else {}
    has_split = "validation" in splits and splits["validation"] is not None
    if "validation" in asked and not has_split:
        raise ConfigError(
            "config.hooks.validation needs a split: set config.data.splits.validation"
        )
    watchers = {
        "config.hooks.early_stopping": "early_stopping" in asked,
        "config.checkpoint.keep_best": value_of(open_checkpoints, manager, "keep_best") > 0,
    }
    for path, watches in watchers.items():
        if watches and "validation" not in asked:
            raise ConfigError(f"{path} needs config.hooks.validation, whose scores it compares")


def build_hooks(experiment: Experiment, options: HookOptions, watched: Watched) -> list[Hook]:
    """Make the hooks in the order in which they act: speak, measure, show, validate, decide,
    save."""
    training, writer, scores = experiment.training, watched.writer, watched.scores
    speed = build_speed(experiment)
    make: dict[str, Callable[..., Hook | list[Hook]]] = {
        "hang": lambda o: watched.hang,
        "nan_stop": lambda o: nan_stop(checkpoints=watched.checkpoints, **o),
        "progress": lambda o: progress(num_steps=training.num_steps, speed=speed, **o),
        "scalars": lambda o: scalars(writer, lr_at=experiment.lr_at, speed=speed, **o),
        "profiler": lambda o: profiler(watched.workdir / "profile", **o),
        "images": lambda o, pictures: _images(experiment, watched, o, pictures),
        "validation": lambda o, passes: _validation(experiment, watched, o, passes),
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
    # A signal saves behind validation, so that a score of the same step is not lost.
    (signal_options,) = options.hooks["signals"]
    return [*hooks, signal_hook(watched.signals, saving.end, **signal_options), saving]


def _as_list(hooks: Hook | list[Hook]) -> list[Hook]:
    return [hooks] if isinstance(hooks, Hook) else hooks


def _images(
    experiment: Experiment, watched: Watched, options: dict[str, Any], pictures: dict[str, Any]
) -> list[Hook]:
    """Show batches of training and, always the same, the first of validation."""
    first_stage = is_first_stage(experiment.sections)
    build = build_log_reconstructions if first_stage else build_log_images
    count, with_images = value_of(images, options, "max_images"), watched.with_images
    log_images = build(
        experiment,
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


def _validation(
    experiment: Experiment, watched: Watched, options: dict[str, Any], passes: dict[str, Any]
) -> Hook:
    assert watched.validation_batches is not None  # bind_hooks asks for the split
    evaluate = build_evaluate(
        experiment, watched.frozen, watched.validation_batches, prefix="val", **passes
    )
    return validation(evaluate, watched.writer, watched.scores, **options)
