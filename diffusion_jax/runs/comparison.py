"""What may differ between the config of a run and one that goes on with it, and what may not."""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from diffusion_jax.experiment.config.as_json import from_data, to_data
from diffusion_jax.experiment.config.binding import ConfigError, choices
from diffusion_jax.experiment.config.files import PREFIX, override_config

# What may differ when a run is continued: how long, how fast, where, and what is watched; never
# what a step computes. lr_schedule is among them because it is as long as the run.
MAY_CHANGE = (
    "train.num_steps",
    "lr_schedule",
    "mesh",
    "hooks",
    "checkpoint",
    "sampler",
    "discretization",
    "guidance",
    "data.source.download",
    "data.batches.cache",
    "data.batches.num_threads",
    "data.batches.num_workers",
    "data.batches.prefetch",
)

# What may differ when a run is drawn from, evaluated or exported: how, and on which data and
# devices, never what was trained.
MAY_CHANGE_LATER = (
    "sampler",
    "guidance",
    "discretization",
    "data",
    "mesh",
    "train.batch_size",
    "train.ckpt_check",
    "first_stage.samples_at_a_time",
    "first_stage.tile",
)

# Where files lie, which may change whenever it wants to: what they hold is compared instead.
_LOCATIONS = re.compile(
    r"train\.ckpt_path|adapters\.from_file|data\.source\.(folder|data_dir)|latent_cache\.folder"
    r"|control\.[^.]+\.weights"
    r"|(first_stage|perceptual|conditioning\.embedders\.[^.]+)\.(weights|vocabulary)"
)


def differences(
    ours: ml_collections.ConfigDict,
    theirs: ml_collections.ConfigDict,
    may_change: Sequence[str] = MAY_CHANGE,
) -> list[str]:
    """List 'path: ours -> theirs' for every leaf that differs, but for what may change."""
    return [
        f"{path}: {old!r} -> {new!r}"
        for path, old, new in leaf_pairs(ours, theirs)
        if not is_under(path, may_change)
    ]


def leaf_pairs(
    ours: ml_collections.ConfigDict, theirs: ml_collections.ConfigDict
) -> list[tuple[str, Any, Any]]:
    """List (path, our value, their value) of every leaf that differs; "unset" for none."""
    left, right = leaves(to_plain(ours)), leaves(to_plain(theirs))
    pairs = ((path, _value(left, path), _value(right, path)) for path in sorted({**left, **right}))
    return [(path, old, new) for path, old, new in pairs if old != new]


def is_under(path: str, free: Iterable[str]) -> bool:
    """Tell whether a path of a config is one of these or below one, or says where files lie."""
    if _LOCATIONS.fullmatch(path):
        return True
    return any(path == above or path.startswith(above + ".") for above in free)


def check_keys(saved: ml_collections.ConfigDict, config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError for a section of a config that the saved one lacks, with its like."""
    for name in config:
        if name not in saved and name not in MAY_CHANGE + MAY_CHANGE_LATER:
            raise ConfigError(f"{PREFIX}{name} is not a section; {choices(name, list(saved))}")


def override_later(
    config: ml_collections.ConfigDict, overrides: Sequence[str] | Mapping[str, Any], where: str
) -> ml_collections.ConfigDict:
    """Override in place what does not change a trained model, and return the config.

    where: what was trained with it. Raises ValueError for anything else than MAY_CHANGE_LATER.
    """
    if not overrides:
        return config
    saved = from_data(to_data(config), where)
    override_config(config, overrides)
    check_keys(saved, config)
    wrong = differences(saved, config, MAY_CHANGE_LATER)
    if wrong:
        raise ValueError(
            f"{where} was trained with another config, which differs in {'; '.join(wrong)}: only "
            f"config.{', config.'.join(MAY_CHANGE_LATER)} can be changed afterwards"
        )
    return config


def with_whole_paths(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Copy a config and make its relative paths whole, so that it means the same in any folder.

    A value that is neither the folder of a latent cache nor there stays as it is.
    Raises ConfigError for a value that is no literal.
    """
    config = from_data(to_data(config), "the config")
    with config.unlocked():
        for path, value in leaves(to_plain(config)).items():
            if not (_LOCATIONS.fullmatch(path) and isinstance(value, str)):
                continue
            place = pathlib.Path(value)
            if (place.exists() or path == "latent_cache.folder") and not value.startswith("~"):
                config.update_from_flattened_dict({path: str(place.absolute())})
    return config


def without_places(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Copy a config for other machines: paths keep their last name, and no mesh is asked for."""
    config = from_data(to_data(config), "the config")
    with config.unlocked():
        if "mesh" in config:
            del config["mesh"]
        for path, value in leaves(to_plain(config)).items():
            if _LOCATIONS.fullmatch(path) and isinstance(value, str) and "package:" not in value:
                config.update_from_flattened_dict({path: pathlib.Path(value).name})
    return config


def to_plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Resolve references and placeholders into nested dicts of Python values."""
    return _plain(config.to_dict())


def leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """Map the path of each value that is no section to the value."""
    return dict(_leaves(tree, ""))


def _value(found: dict[str, Any], path: str) -> Any:
    return found[path] if path in found else "unset"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
