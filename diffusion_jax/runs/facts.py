"""facts.json of a run: when and on what each of its starts ran, and what it was made from."""

import logging
import os
import pathlib
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from diffusion_jax.experiment.config.as_json import read_json, write_json
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import ConfigFile
from diffusion_jax.runs.comparison import leaf_pairs

FACTS = "facts.json"
_log = logging.getLogger(__name__)


def record_start(
    workdir: pathlib.Path,
    made: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    *,
    step: int,
    config_file: ConfigFile | None = None,
) -> None:
    """Add a start of training to the facts of a run, in process 0.

    made: what the run is made from, see identity.made_from. config_file: the file that the config
    came from, if it is known; values that differ from the file are kept.
    """
    if jax.process_index() != 0:
        return
    start = {
        "time": round(time.time(), 3),
        "step": step,
        "hardware": hardware(),
        "data": short_data(made["data"]),
        **{name: made[name] for name in ("revision", "code", "packages")},
    }
    if config_file is not None:
        differs = file_differences(config_file, config)
        start |= {"config_file": config_file.path, "differs": differs}
    facts = read_facts(workdir)
    write_json(workdir / FACTS, {**facts, "starts": [*starts_of(facts), start]})


def read_facts(workdir: pathlib.Path) -> dict[str, Any]:
    """Read the facts of a run; {} when there are none, and with a warning for a damaged file."""
    path = workdir / FACTS
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path))
    except ConfigError as error:
        _log.warning("%s; it is left out", error)
        return {}


def starts_of(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the starts among the facts of a run; what is not a start is left out."""
    starts = facts["starts"] if "starts" in facts else []
    if not isinstance(starts, list):
        return []
    return [s for s in starts if isinstance(s, dict) and _is_time(s.get("time"))]


def _is_time(value: Any) -> bool:
    """Tell whether a value can be seconds since 1970."""
    return isinstance(value, (int, float)) and 0 <= value < 2**35


def hardware() -> dict[str, Any]:
    """Describe the devices of all processes, and the host of this one."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def file_differences(
    file: ConfigFile, config: ml_collections.ConfigDict
) -> list[dict[str, Any]] | None:
    """List {"path", "file", "run"} of values that differ from the file of a config.

    None when the file alone is no whole config, because a value of it has to be given.
    """
    if file.config is None:
        return None
    pairs = leaf_pairs(file.config, config)
    return [{"path": path, "file": said(old), "run": said(new)} for path, old, new in pairs]


def said(value: Any) -> str:
    """Write a value of a config as it stands in Python; "unset" stays as it is."""
    return value if value == "unset" else repr(value)


def short_data(fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the name, the size and the digest of the fingerprint of each split."""
    wanted = ("name", "num_examples", "digest")
    return {
        role: {name: found[name] for name in wanted if name in found}
        for role, found in fingerprints.items()
    }
