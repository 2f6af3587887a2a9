"""A native file: a model and its config in one .safetensors file that needs nothing beside it."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.native import KEY, export_tree, read_about
from diffusion_jax.experiment.config.as_json import json_text, parse_json, to_data
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import saved_config
from diffusion_jax.experiment.task import Trained
from diffusion_jax.runs.comparison import without_places
from diffusion_jax.runs.identity import made_from
from diffusion_jax.types import PyTree

# What a checkpoint knows and a native file keeps, beside the config.
_KEPT = ("class_names", "revision", "code", "packages")


class About(NamedTuple):
    """What the header of a native file says: its config, which weights it has, and of what step.

    weights: "averages" or "raw". step: None for weights that came from a released file. facts: all
    that is said, as data.
    """

    config: ml_collections.ConfigDict
    weights: str
    step: int | None
    class_names: tuple[str, ...] | None
    facts: Mapping[str, Any]


def find_about(path: str | os.PathLike) -> About | None:
    """Read what a native file says of itself, as data; None for any other file or folder.

    Raises ConfigError when that is damaged.
    """
    text = read_about(path)
    if text is None:
        return None
    facts = parse_json(text, f"the header of {path}")
    config = saved_config(facts, f"the header of {path}")
    try:
        names = facts["class_names"] if "class_names" in facts else None
        names = None if names is None else tuple(map(str, names))
        return About(config, str(facts["weights"]), facts["step"], names, facts)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the header of {path} is damaged: {error}") from error


def write_native(
    path: str | os.PathLike,
    config: ml_collections.ConfigDict,
    trained: Trained,
    frozen: PyTree,
    *,
    weights: str,
    step: int | None,
    known: Mapping[str, Any],
    dtype: Any = None,
    nonfinite: bool = False,
) -> None:
    """Write a native file.

    frozen: the weights of trained.frozen without constants. known: the metadata of the checkpoint
    that trained is from, or of the native file. weights, step: see About.
    Raises what save_weights and export_tree raise.
    """
    about = {
        **made_from(config),
        **{name: known[name] for name in _KEPT if name in known},
        "config": to_data(without_places(config)),
        "weights": weights,
        "step": step,
    }
    trees = {"params/": trained.params, "mutable/": trained.mutable, "frozen/": frozen}
    if trained.ema is not None:
        trees["ema/"] = trained.ema
    parts = [
        export_tree(tree, prefix, dtype=dtype, nonfinite=nonfinite)
        for prefix, tree in trees.items()
    ]
    save_weights(path, parts, metadata={KEY: json_text(about)})
