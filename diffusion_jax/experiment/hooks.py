"""The `hooks` and `checkpoint` sections -> the options of what watches a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.experiment.binding import ConfigError, bind_shared, known_sections, value_of
from diffusion_jax.experiment.task import Task
from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.hooks.checkpoint import checkpoint
from diffusion_jax.train.hooks.early_stopping import early_stopping
from diffusion_jax.train.hooks.hang import watch_hangs
from diffusion_jax.train.hooks.images import images
from diffusion_jax.train.hooks.nan_stop import nan_stop
from diffusion_jax.train.hooks.profiler import profiler
from diffusion_jax.train.hooks.progress import progress
from diffusion_jax.train.hooks.scalars import scalars
from diffusion_jax.train.hooks.signals import signal_hook
from diffusion_jax.train.hooks.validation import validation


class Passes(NamedTuple):
    """How much of the validation split is looked at: num_batches, None for all of it."""

    num_batches: int | None = None


# Section -> the functions that its keys go to, each with what the run supplies.
_TARGETS: dict[str, tuple[tuple[Callable, tuple[str, ...]], ...]] = {
    "progress": ((progress, ("num_steps", "speed", "stream")),),
    "scalars": ((scalars, ("writer", "lr_at", "speed")),),
    "nan_stop": ((nan_stop, ("checkpoints",)),),
    "hang": ((watch_hangs, ()),),
    "signals": ((signal_hook, ("received", "save")),),
    "images": (),  # see bind_hooks: what they show is a matter of the task
    "validation": (
        (validation, ("evaluate", "writer", "scores")),
        (Passes, ()),
    ),
    "early_stopping": ((early_stopping, ("scores",)),),
    "profiler": ((profiler, ("directory",)),),
}


_IMAGES = (images, ("log_images", "writer", "split", "batch"))
ALWAYS = ("progress", "scalars", "nan_stop", "hang", "signals")
_CHECKPOINT_TARGETS = (
    (checkpoint, ("checkpoints", "metadata", "scores", "writer")),
    (open_checkpoints, ("directory", "needed_bytes")),
)
DEFAULT_CHECKPOINT = {"every": 1000}


class HookOptions(NamedTuple):
    """Keywords of the hooks that a config asks for, one dict a function, and of its checkpoints."""

    hooks: Mapping[str, list[dict[str, Any]]]
    checkpoint: dict[str, Any]
    checkpoints: dict[str, Any]


def bind_hooks(sections: Mapping[str, Any], task: Task) -> HookOptions:
    """Check the `hooks` and `checkpoint` sections; ConfigError names path, value and choices."""
    asked = sections["hooks"] if "hooks" in sections else {}
    known_sections(asked, _TARGETS, "config.hooks")
    asked = {name: {} for name in ALWAYS} | asked
    saving = sections["checkpoint"] if "checkpoint" in sections else DEFAULT_CHECKPOINT
    checkpoint_options, manager_options = bind_shared(
        saving, "config.checkpoint", *_CHECKPOINT_TARGETS
    )
    _check_monitors(sections, asked, manager_options)
    pictures = (task.pictures, ("frozen", "class_names", "max_images"))
    targets = _TARGETS | {"images": (_IMAGES, pictures)}
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
