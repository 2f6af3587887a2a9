"""What a run was made from: kept in checkpoints, compared on going on, one for all processes."""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.data.sources.fingerprint import data_differences
from diffusion_jax.experiment.config.as_json import to_data
from diffusion_jax.experiment.config.files import saved_config
from diffusion_jax.experiment.data import Data
from diffusion_jax.runs.comparison import MAY_CHANGE, is_under, leaf_pairs, leaves, to_plain

_PACKAGE = pathlib.Path(__file__).parents[1]
_PACKAGES = "jax jaxlib numpy flax optax orbax-checkpoint grain tensorflow-datasets pillow".split()
_SHOWN = 5
_GIT_SECONDS = 10.0


def made_from(config: ml_collections.ConfigDict, **more: Any) -> dict[str, Any]:
    """Describe what a run is made from, in values that JSON can hold; more: beside these keys."""
    return {"config": to_data(config), **code_facts(), **more}


@functools.cache
def code_facts() -> Mapping[str, Any]:
    """Describe the code and the packages of this process."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"revision": git_revision(), "code": code_digest(), "packages": versions}


def fingerprints(data: Data) -> dict[str, Any]:
    """Describe the content of each split that a config names, by role."""
    roles = [role for role, split in data.splits.items() if split is not None]
    return {role: data.fingerprint(data.source(role)) for role in roles}


def new_changes(
    metadata: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    step: int,
    where: str,
    *,
    named: Collection[str] = (),
    known: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """List what a config changes on purpose of the one that a checkpoint was made with.

    named: paths that are changed now. known: what was changed before, see folder.Record.
    Raises ValueError, naming every other difference.
    """
    done = {change["path"]: change["new"] for change in known if change["step"] == step}
    found, wrong = [], []
    for path, old, new in leaf_pairs(saved_config(metadata, where), config):
        if is_under(path, MAY_CHANGE) or (path in done and _json(done[path]) == _json(new)):
            continue
        if is_under(path, named):
            found.append({"step": step, "path": path, "old": old, "new": new})
        else:
            wrong.append(f"{path}: {old!r} -> {new!r}")
    if wrong:
        raise ValueError(
            f"the checkpoint {where} was made with another config, which differs in "
            f"{'; '.join(wrong)}: it is of another run, or the config was edited; "
            "--change=PATH=VALUE changes a value on purpose"
        )
    return found


def changed_data(metadata: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """List what differs between the data of a checkpoint and those that are there now."""
    saved = metadata["data"] if "data" in metadata else {}
    return [
        f"{role}: {line}"
        for role in found
        if role in saved
        for line in data_differences(saved[role], found[role])
    ]


def code_differences(metadata: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """List in which code and packages a checkpoint differs from a run that goes on with it."""
    left, right = (
        leaves({name: part[name] for name in code_facts() if name in part})
        for part in (metadata, own)
    )
    return [f"{key} {left[key]} -> {right[key]}" for key in left if left[key] != right.get(key)]


def agree(facts: Mapping[str, Any]) -> None:
    """Make sure that all processes have the same facts, nested dicts; all have to call it.

    Raises ValueError in all of them, naming the process and the keys that differ.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(_json(facts).encode(), np.uint8)
    digest = np.frombuffer(hashlib.sha256(text.tobytes()).digest(), np.uint8)
    sums = np.asarray(multihost_utils.process_allgather(digest))
    if (sums == sums[0]).all():
        return
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.pad(text, (0, sizes.max() - len(text)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    parsed = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    first = leaves(parsed[0])
    lines = []
    for number, other in enumerate(map(leaves, parsed)):
        keys = sorted(first.keys() | other.keys())
        wrong = [key for key in keys if _said(first, key) != _said(other, key)]
        shown = [
            f"{key} = {_said(other, key)} (process 0: {_said(first, key)})"
            for key in wrong[:_SHOWN]
        ]
        if wrong:
            rest = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            lines.append(f"process {number} has {', '.join(shown)}{rest}")
    raise ValueError(
        f"the processes of one run should agree in config, code, packages and data: "
        f"{'; '.join(lines[:_SHOWN])}"
    )


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _said(found: Mapping[str, Any], key: str) -> str:
    return _json(found[key]) if key in found else "nothing"


def config_facts(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """List the values of a config by path, but for where files lie, which may differ by host."""
    return {
        f"config.{path}": value
        for path, value in leaves(to_plain(config)).items()
        if not is_under(path, ())
    }


def code_digest() -> str:
    """Hash the source files of this package."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def git_revision() -> str:
    """Return the git revision of the code, '+' for uncommitted changes, 'unknown' without git."""
    try:
        revision = _git(_PACKAGE, "rev-parse", "HEAD")
        return revision + ("+" if _git(_PACKAGE, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # an installed package has no repository; the run is recorded all the same


def _git(folder: pathlib.Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *command],
        capture_output=True,
        text=True,
        check=True,
        timeout=_GIT_SECONDS,
    )
    return done.stdout.strip()
