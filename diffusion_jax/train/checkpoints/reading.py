"""Reading checkpoints: exactly what was saved, or one sentence on what is wrong with it.

Nothing falls back in silence to another checkpoint, and nothing is written.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.train.checkpoints.checksums import VERSIONS, checksums, named_leaves, path_name
from diffusion_jax.types import PyTree

SET_ASIDE = "set_aside"  # folder of checkpoints that are later than the one a run went back to
_ASIDE = re.compile(r"\d+(\.\d+)?")  # a number behind the step where that name was taken
_SHOWN = 4  # names in one message


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read back as it was written."""

    def __init__(self, message: str, whole: int | None = None) -> None:
        """Keep `whole`, the step of the newest whole one before it: None if there is none."""
        super().__init__(message)
        self.whole = whole


def restore_state(
    directory: str | os.PathLike, abstract_state: PyTree, step: int | str | None = None
) -> tuple[PyTree, dict[str, Any]]:
    """Read a checkpoint into shapes, dtypes and shardings -> (state, metadata).

    Every array is checked against its checksum.

    Args:
        directory: the folder of a run's checkpoints.
        abstract_state: jax.ShapeDtypeStruct leaves with shardings; the checkpoint must hold exactly
            these arrays.
        step: None for the newest; "set_aside/20.2" is one that was set aside.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it holds other arrays, or was written by a newer version of this package.
        DamagedCheckpoint: it cannot be read; the message names the newest whole one before it.
    """
    directory = epath.Path(directory).absolute()
    step = _choose(directory, step)
    try:
        return _read_state(directory, abstract_state, step)
    except DamagedCheckpoint as error:
        whole = _newest_whole(directory, abstract_state, before=number_of(step))
        found = (
            "there is no whole one before it"
            if whole is None
            else f"the newest whole one before it is {directory / str(whole)}"
        )
        raise DamagedCheckpoint(f"{error}; {found}", whole) from error


def load_params(
    directory: str | os.PathLike,
    abstract_params: PyTree = None,
    *,
    step: int | str | None = None,
    ema: bool = True,
) -> PyTree:
    """Read only the averaged (EMA) or the raw parameters of a checkpoint, and check them.

    Args:
        directory: the folder of a run's checkpoints.
        abstract_params: shapes, dtypes and shardings to read them into. Without it, and for leaves
            without a sharding, the result holds NumPy arrays.
        step: None for the newest.
        ema: the averaged parameters; ValueError when the run keeps no average.
    """
    directory = epath.Path(directory).absolute()
    step = _choose(directory, step)
    tree, record = _read_description(directory, step)
    prefix = _ema_prefix(tree, directory / str(step)) if ema else "params/"
    return _load_under(prefix, directory, step, tree, record, abstract_params)


def load_track(
    directory: str | os.PathLike,
    number: int,
    abstract_params: PyTree,
    *,
    step: int | str | None = None,
) -> PyTree:
    """Read and check one track of the power averages of a checkpoint, see train.power_ema.

    abstract_params: shapes, float32 dtypes and shardings to read it into. step: None for the
    newest. Raises ValueError when the run keeps no such averages.
    """
    directory = epath.Path(directory).absolute()
    step = _choose(directory, step)
    tree, record = _read_description(directory, step)
    found = [name for name in named_leaves(tree) if "power_ema/tracks/" in name]
    if not found:
        raise ValueError(
            f"the checkpoint {directory / str(step)} holds no averages of any length; set "
            "config.ema.power, such as (0.05, 0.1), before training"
        )
    prefix = f"{found[0].partition('tracks/')[0]}tracks/{number}/"
    return _load_under(prefix, directory, step, tree, record, abstract_params)


def load_mutable(directory: str | os.PathLike, *, step: int | str | None = None) -> PyTree:
    """Read and check only the mutable collections, such as running statistics, as NumPy arrays."""
    directory = epath.Path(directory).absolute()
    step = _choose(directory, step)
    return _load_under("mutable/", directory, step, *_read_description(directory, step))


def load_under(prefix: str, directory: str | os.PathLike) -> PyTree:
    """Read and check what the newest checkpoint has under names that begin with prefix.

    prefix: such as "conditioner/clip/". The values are NumPy arrays; nothing found is {}.
    """
    directory = epath.Path(directory).absolute()
    step = _choose(directory, None)
    return _load_under(prefix, directory, step, *_read_description(directory, step))


def load_metadata(directory: str | os.PathLike, *, step: int | str | None = None) -> dict[str, Any]:
    """Read only what was saved beside the state: config, revision, place in the data, seed."""
    directory = epath.Path(directory).absolute()
    return _read_description(directory, _choose(directory, step))[1]["metadata"]


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """List the steps of a folder's finished checkpoints, whole or damaged, in order."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


def name_of(directory: str | os.PathLike, step: int) -> int | str:
    """Return a step, or "set_aside/STEP" when its checkpoint lies only there."""
    aside = f"{SET_ASIDE}/{step}"
    directory = epath.Path(directory)
    is_aside = not (directory / str(step)).is_dir() and (directory / aside).is_dir()
    return aside if is_aside else step


def number_of(name: int | str) -> int:
    """Return the step of a checkpoint's name: 20 of "set_aside/20.2"."""
    return int(str(name).rpartition("/")[2].partition(".")[0])


def resolve_checkpoint(path: str | os.PathLike) -> tuple[epath.Path, int | str]:
    """Find what --resume means -> (workdir, step).

    path: a run's folder or its checkpoints/ (the newest one), one checkpoint, a file in it, or a
    checkpoint in set_aside/. Where the step alone does not name that one, because another has its
    place or it has a number of its own, the step is its name, such as "set_aside/20.2".
    Raises FileNotFoundError when there is none.
    """
    path = epath.Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}: it does not exist")
    for place in (path, *path.parents):
        if place.name.isdigit() and place.parent.name == "checkpoints":
            return place.parent.parent, int(place.name)
        aside = place.parent
        if not (_ASIDE.fullmatch(place.name) and aside.name == SET_ASIDE):
            continue
        if aside.parent.name == "checkpoints":
            alone = place.name.isdigit() and not (aside.parent / place.name).exists()
            name = int(place.name) if alone else f"{SET_ASIDE}/{place.name}"
            return aside.parent.parent, name
    directory = path if path.name == "checkpoints" else path / "checkpoints"
    return directory.parent, _choose(directory, None)


def _choose(directory: epath.Path, step: int | str | None) -> int | str:
    if isinstance(step, str):
        if not (directory / step).is_dir():
            raise FileNotFoundError(f"there is no checkpoint {directory / step}")
        return step
    steps = saved_steps(directory)
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {directory}")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise FileNotFoundError(
            f"there is no checkpoint of step {step} in {directory}; there are {few(steps)}"
        )
    return step


def _read_state(
    directory: epath.Path, abstract_state: PyTree, step: int | str
) -> tuple[PyTree, dict]:
    tree, record = _read_description(directory, step)
    _check_same(named_leaves(tree), named_leaves(abstract_state), directory / str(step))
    return _read_arrays(directory, step, abstract_state, record), record["metadata"]


def _read_description(directory: epath.Path, step: int | str) -> tuple[PyTree, dict[str, Any]]:
    """Read what a checkpoint says it holds -> (tree of array metadata, record)."""
    folder = directory / str(step)
    try:
        record = json.loads((folder / "metadata" / "metadata").read_text())
        described: Any = ocp.PyTreeCheckpointHandler().metadata(folder / "state")
        if absent := {"checksums", "metadata"} - set(record):
            raise KeyError(*absent)
    except Exception as error:
        raise _damage(folder, "its description is missing or broken", error) from error
    version = _version(record)
    if version not in VERSIONS:
        raise ValueError(
            f"the checkpoint {folder} has format = {version!r}, which should be one of "
            f"{', '.join(map(str, VERSIONS))}: it was written by a newer version of diffusion_jax"
        )
    return described.tree, record


def _version(record: Mapping[str, Any]) -> Any:
    """Which formula the checksums have; the first checkpoints did not say it."""
    return record["format"] if "format" in record else VERSIONS[0]


def _load_under(
    prefix: str,
    directory: epath.Path,
    step: int | str,
    tree: PyTree,
    record: dict[str, Any],
    abstract: PyTree = None,
) -> PyTree:
    """Read the arrays whose names start with prefix, into `abstract` or as nested dictionaries."""
    saved = {n: a for n, a in named_leaves(tree).items() if n.startswith(prefix)}
    wanted = saved if abstract is None else named_leaves(abstract, prefix)
    if not wanted and abstract is None:
        return {}
    _check_same(saved, wanted, directory / str(step))
    item = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _wanted_leaf(wanted, path_name(path), leaf), tree
    )
    values = named_leaves(_read_arrays(directory, step, item, record))
    if abstract is None:
        return _nest({n.removeprefix(prefix): values[n] for n in wanted})
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: values[prefix + path_name(path)], abstract
    )


def _read_arrays(
    directory: epath.Path, step: int | str, item: PyTree, record: Mapping[str, Any]
) -> PyTree:
    """Read the arrays of `item` that are not placeholders, and compare their checksums."""
    folder = directory / str(step)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(_restore_args, item))
    with _failing_together(folder):
        values = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=arguments)
    read = {n: leaf for n, leaf in named_leaves(values).items() if leaf is not ocp.PLACEHOLDER}
    sums = record["checksums"]
    found = checksums(read, version=_version(record))
    changed = [name for name, value in found.items() if name not in sums or sums[name] != value]
    if changed:
        raise _damage(folder, f"the values of {few(changed)} are not the ones that were saved")
    return values


@contextlib.contextmanager
def _failing_together(folder: epath.Path) -> Iterator[None]:
    """Raise in all processes if one cannot read its part, lest the others wait for it."""
    try:
        yield
    except Exception as error:
        anywhere(True)
        raise _damage(folder, "its arrays cannot be read", error) from error
    if anywhere(False):
        raise _damage(folder, "another process cannot read its part of the arrays")


def anywhere(failed: bool) -> bool:
    """Whether this is true in any process; all processes have to call it together."""
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.int32(failed))))


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = _sharding(leaf)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _wanted_leaf(wanted: Mapping[str, Any], name: str, saved: Any) -> Any:
    if name not in wanted:
        return ocp.PLACEHOLDER
    sharding = _sharding(wanted[name])
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    # Orbax describes saved arrays with objects that have a "sharding" of another kind.
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


def _nest(named: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


def _ema_prefix(tree: PyTree, folder: epath.Path) -> str:
    # An EmaState is saved as its fields, {"num_updates", "params"}; no other state has both.
    counts = [n for n in named_leaves(tree["opt_state"]) if n.rpartition("/")[2] == "num_updates"]
    if len(counts) != 1:
        raise ValueError(
            f"the checkpoint {folder} holds {len(counts)} averages of the parameters and should "
            "hold 1; pass ema=False, or --raw, for the raw parameters"
        )
    return f"opt_state/{counts[0].removesuffix('num_updates')}params/"


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: epath.Path) -> None:
    problems = []
    if missing := [name for name in wanted if name not in saved]:
        problems.append(f"it lacks {few(missing)}")
    if unknown := [name for name in saved if name not in wanted]:
        problems.append(f"it holds {few(unknown)}, which the config does not have")
    if different := [
        f"{name} ({_kind(saved[name])}, not {_kind(wanted[name])})"
        for name in wanted
        if name in saved and _kind(saved[name]) != _kind(wanted[name])
    ]:
        problems.append(f"it has other shapes or dtypes: {few(different)}")
    if problems:
        raise ValueError(f"the checkpoint {folder} is of another config: {'; '.join(problems)}")


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def few(names: Iterable[Any]) -> str:
    """List the first names, and say how many more there are."""
    names = list(names)
    shown = ", ".join(str(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _damage(folder: epath.Path, what: str, error: Exception | None = None) -> DamagedCheckpoint:
    reason = "" if error is None else f" ({type(error).__name__}: {str(error)[:200]})"
    return DamagedCheckpoint(f"the checkpoint {folder} is damaged: {what}{reason}")


def _newest_whole(directory: epath.Path, abstract_state: PyTree, *, before: int) -> int | None:
    earlier = [step for step in saved_steps(directory) if step < before]
    for step in reversed(earlier):
        try:
            _read_state(directory, abstract_state, step)
        except DamagedCheckpoint:
            continue
        return step
    return None
