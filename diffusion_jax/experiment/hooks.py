"""The `hooks` and `checkpoint` sections -> the options of what watches a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.experiment.config.binding import (
    ConfigError,
    Section,
    Target,
    bind_section,
    check_section,
    known_sections,
    parameters_of,
    value_of,
)
from diffusion_jax.experiment.config.options import PromptOptions
from diffusion_jax.experiment.scoring import Levels, ScoringOptions, check_scoring
from diffusion_jax.experiment.task import Task
from diffusion_jax.train.checkpoints.saving import check_keeping, open_checkpoints
from diffusion_jax.train.hooks.checkpoint import checkpoint
from diffusion_jax.train.hooks.early_stopping import early_stopping
from diffusion_jax.train.hooks.hang import watch_hangs
from diffusion_jax.train.hooks.images import images
from diffusion_jax.train.hooks.levels import levels
from diffusion_jax.train.hooks.metrics import PREFIX, metrics
from diffusion_jax.train.hooks.nan_stop import nan_stop
from diffusion_jax.train.hooks.profiler import profiler
from diffusion_jax.train.hooks.progress import progress
from diffusion_jax.train.hooks.scalars import scalars
from diffusion_jax.train.hooks.signals import signal_hook
from diffusion_jax.train.hooks.validation import validation
from diffusion_jax.train.wandb_writer import wandb_writer


class Passes(NamedTuple):
    """How much of the validation split is looked at: num_batches, None for all of it."""

    num_batches: int | None = None


# Name of a hook -> what its keys go to, each with what the run supplies.
_TARGETS: dict[str, tuple[Target, ...]] = {
    "progress": ((progress, ("num_steps", "speed", "stream", "lr_at", "scores", "monitor")),),
    "scalars": ((scalars, ("writer", "lr_at", "speed")),),
    "nan_stop": ((nan_stop, ("checkpoints",)),),
    "hang": ((watch_hangs, ()),),
    "signals": ((signal_hook, ("received", "save")),),
    "images": ((images, ("log_images", "writer", "split", "batch")),),  # see hook_sections
    "prompts": ((PromptOptions, ()),),
    "validation": ((validation, ("evaluate", "writer", "scores")), (Passes, ())),
    "levels": ((levels, ("evaluate", "lines", "writer")), (Levels, ())),
    "metrics": ((metrics, ("score", "writer", "scores", "clock")), (ScoringOptions, ())),
    "early_stopping": ((early_stopping, ("scores",)),),
    "profiler": ((profiler, ("directory",)),),
    "wandb": ((wandb_writer, ("workdir", "config")),),
}
_PICTURES = ("drawing", "networks", "setting", "frozen", "class_names", "max_images")
ALWAYS = ("progress", "scalars", "nan_stop", "hang", "signals")
NEEDED = ("hang", "signals")  # cannot be switched off
CHECKPOINT = Section(
    "config.checkpoint",
    "When checkpoints are saved, and which are kept.",
    (
        (checkpoint, ("checkpoints", "metadata", "scores", "writer")),
        (open_checkpoints, ("directory", "needed_bytes")),
    ),
)
DEFAULT_CHECKPOINT = {"every": 1000}


def hook_sections(pictures: Callable) -> dict[str, Section]:
    """Map the name of every hook to its section; Task.pictures decides what images show."""
    targets = {**_TARGETS, "images": (*_TARGETS["images"], (pictures, _PICTURES))}
    return {
        name: Section(f"config.hooks.{name}", str(own[0][0].__doc__).partition("\n")[0], own)
        for name, own in targets.items()
    }


class HookOptions(NamedTuple):
    """Keywords of the hooks that a config asks for, one dict a function, and of its checkpoints."""

    hooks: Mapping[str, tuple[dict[str, Any], ...]]
    checkpoint: dict[str, Any]
    checkpoints: dict[str, Any]


def bind_hooks(
    sections: Mapping[str, Any], task: Task, splits: Mapping[str, str | None]
) -> HookOptions:
    """Check the `hooks` and `checkpoint` sections; ConfigError names path, value and choices.

    A hook that is None is switched off. splits: role -> split of the data, None for none;
    validation needs one.
    """
    known = hook_sections(task.pictures)
    asked = {} if sections["hooks"] is None else sections["hooks"]
    known_sections(asked, known, "config.hooks")
    for name in NEEDED:
        if name in asked:
            check_section(asked[name], known[name].path)
    asked = {name: {} for name in ALWAYS} | asked
    asked = {name: section for name, section in asked.items() if section is not None}
    saving = sections["checkpoint"]
    checkpoint_options, manager_options = bind_section(
        CHECKPOINT, DEFAULT_CHECKPOINT if saving is None else saving
    ).own
    _check_monitors(asked, manager_options, splits)
    _check_keeping(manager_options)
    hooks = {name: bind_section(known[name], section).own for name, section in asked.items()}
    for name in ("metrics", "levels"):
        if name in hooks and task.drawing is None:
            raise ConfigError(f"config.hooks.{name} needs a model that draws samples")
    if "metrics" in hooks:
        _check_metrics(hooks["metrics"][1])
    if "prompts" in hooks:
        _check_prompts(PromptOptions(**hooks["prompts"][0]), task)
    return HookOptions(hooks, checkpoint_options, manager_options)


def _check_metrics(options: Mapping[str, Any]) -> None:
    try:
        check_scoring(ScoringOptions(**options))
    except (ValueError, FileNotFoundError) as error:
        names_option = str(error).partition(" ")[0] in ScoringOptions._fields
        raise ConfigError(f"config.hooks.metrics{'.' if names_option else ': '}{error}") from error


def _check_prompts(options: PromptOptions, task: Task) -> None:
    path, network = "config.hooks.prompts", None if task.drawing is None else task.drawing.network
    embedders = {} if network is None else network.embedders
    staged = any(embedder.staged is not None for embedder in embedders.values())
    if network is None or not embedders or network.num_frames is not None or staged:
        raise ConfigError(
            f"{path} needs a model that draws images of a text or a class alone, and this is none"
        )
    if not options.prompts:
        raise ConfigError(f"{path}.prompts = () should hold a prompt or a class for each picture")


def _check_keeping(manager: Mapping[str, Any]) -> None:
    names = parameters_of(check_keeping)
    try:
        check_keeping(**{name: value_of(open_checkpoints, manager, name) for name in names})
    except ValueError as error:
        raise ConfigError(f"{CHECKPOINT.path}.{error}") from error


def _check_monitors(
    asked: Mapping[str, Any], manager: Mapping[str, Any], splits: Mapping[str, str | None]
) -> None:
    """Nothing may wait in silence for a validation that never comes."""
    for name in ("validation", "levels"):
        if name in asked and splits["validation"] is None:
            raise ConfigError(
                f"config.hooks.{name} needs a split: set config.data.splits.validation"
            )
    watchers: dict[str, Mapping[str, Any]] = {}
    if "early_stopping" in asked:
        watchers["config.hooks.early_stopping"] = asked["early_stopping"]
    if value_of(open_checkpoints, manager, "keep_best") > 0:
        watchers["config.checkpoint.keep_best"] = manager
    for path, section in watchers.items():
        monitor = section["monitor"] if "monitor" in section else ""
        source = "metrics" if str(monitor).startswith(PREFIX) else "validation"
        if source not in asked:
            raise ConfigError(f"{path} needs config.hooks.{source}, whose scores it compares")
