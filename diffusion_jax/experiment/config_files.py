"""A config file with its variant and overrides -> a ConfigDict."""

import ast
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags as absl_flags
from ml_collections import config_flags


def load_config(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Load configs/x.py[:variant] and apply --config.a.b=value overrides.

    A key that the file has keeps its type, unless that is None. One that it lacks is added, so that
    every option of a bound function can be set; build says whether there is such an option.
    Raises FileNotFoundError for a missing file and ValueError for a value that does not fit.
    """
    file = pathlib.Path(path.partition(":")[0])
    if not file.is_file():
        raise FileNotFoundError(f"the config file {file} does not exist")
    values = absl_flags.FlagValues()
    there, missing = _split_overrides(path, overrides)
    argv = ["launch.py", f"--config={path}", *there]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (absl_flags.Error, KeyError) as error:
        raise ValueError(f"{path} with {' '.join(there)}: {error}") from error
    config = values["config"].value
    assert config is not None  # --config was in argv
    with config.unlocked():
        for key, value in missing.items():
            _add(config, key, value)
    return config


def _split_overrides(path: str, overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part overrides: those of keys that the file has, as they are; {key: text} of the others."""
    file, _, variant = path.partition(":")
    config = load_config_file(pathlib.Path(file), variant if ":" in path else None)
    there, missing = [], {}
    for override in overrides:
        key, equals, text = override.removeprefix("--config.").partition("=")
        if not equals:
            raise ValueError(f"{override} should be --config.section.key=value")
        # config_flags takes the text None for a word, and cannot change a value that is None.
        if _value(config, key) is not None and text != "None":
            there.append(override)
        else:
            missing[key] = text
    return there, missing


def _value(config: Any, key: str) -> Any:
    """Look up a dotted key; None when there is no such key."""
    for part in key.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or part not in config:
            return None
        config = config[part]
    return config


def _add(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if section not in config:
            config[section] = ml_collections.ConfigDict()
        config = config[section]
        if not isinstance(config, ml_collections.ConfigDict):
            raise ValueError(f"--config.{key}={text}: {section!r} is a value and has no keys")
    config[last] = _literal(text)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a word, such as a path


def load_config_file(path: pathlib.Path, variant: str | None = None) -> ml_collections.ConfigDict:
    """Run a config file's get_config(variant), as `--config=path:variant` does."""
    if not path.is_file():
        raise FileNotFoundError(f"the config file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a file that exists has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(variant) if variant is not None else module.get_config()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
