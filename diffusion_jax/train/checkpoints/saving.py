"""Checkpoints of a run: saved in the background, restored exactly, or a sentence on what is wrong.

Synopsis:

    checkpoints = open_checkpoints(workdir / "checkpoints", keep_last=2)
    checkpoints.save(step, state, {"next_batch": step, "seed": 0, "config": {...}})
    state, metadata = checkpoints.restore(abstract_state)
    checkpoints.close()

On disk (Orbax): {directory}/{step}/state and {directory}/{step}/metadata, which holds the caller's
metadata and one checksum per array. The average of the parameters is in the state, inside
opt_state; load_params reads it, or the parameters, alone. Nothing here takes another checkpoint
than the one asked for unless told so (on_damage), and nothing is overwritten: a checkpoint that is
in the way is moved to {directory}/set_aside.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from diffusion_jax.train.checkpoints.checksums import VERSIONS, checksums
from diffusion_jax.train.checkpoints.folder import (
    PARTIAL,
    Folder,
    SaveFailed,
    free_bytes,
    wait_for_all,
)
from diffusion_jax.train.checkpoints.reading import (
    SET_ASIDE,
    DamagedCheckpoint,
    load_metadata,
    load_mutable,
    load_params,
    name_of,
    number_of,
    resolve_checkpoint,
    restore_state,
    saved_steps,
)
from diffusion_jax.train.hooks.validation import is_due
from diffusion_jax.types import PyTree

__all__ = [
    "Checkpoints",
    "DamagedCheckpoint",
    "SaveFailed",
    "load_metadata",
    "load_mutable",
    "load_params",
    "open_checkpoints",
    "resolve_checkpoint",
    "restore_state",
    "saved_steps",
    "set_aside_later",
    "state_bytes",
]

_log = logging.getLogger(__name__)
_PROBE_BYTES = 1 << 16
_WORST = {"min": math.inf, "max": -math.inf}
_ON_DAMAGE = ("stop", "previous")


class Checkpoints(NamedTuple):
    """An open folder of checkpoints, as a record of functions.

    save(step, state, metadata, metrics=None) -> bool: start saving and return as soon as the state
        may be donated. False when the step is there already, which then only gets the metrics that
        it lacks. When the save before this one failed in the background, a warning says so. Raises
        SaveFailed, an OSError, when this save cannot start.
    restore(abstract_state, step=None): restore_state, and what on_damage says.
    go_back(abstract_state, step): restore an earlier step, or one that was set aside (its step, or
        a name such as "set_aside/20.2"), and only after it was read move the later ones to
        set_aside, and one that has its place.
    all_steps() and latest_step() count a save that is still under way.
    is_best(metrics): whether a checkpoint with these metrics would be among the best to keep;
        ValueError when the monitor is not one of them.
    wait(): return when all is on disk; SaveFailed when it is not.
    close(): wait and close.
    """

    directory: epath.Path
    save: Callable[..., bool]
    restore: Callable[..., tuple[PyTree, dict[str, Any]]]
    go_back: Callable[..., tuple[PyTree, dict[str, Any]]]
    all_steps: Callable[[], list[int]]
    latest_step: Callable[[], int | None]
    is_best: Callable[[Mapping[str, float]], bool]
    wait: Callable[[], None]
    close: Callable[[], None]


def open_checkpoints(
    directory: str | os.PathLike,
    *,
    keep_last: int = 2,
    keep_every: int | None = None,
    keep_best: int = 0,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    on_damage: Literal["stop", "previous"] = "stop",
    needed_bytes: int = 0,
) -> Checkpoints:
    """Open, or make, a folder to save checkpoints in, and find out now whether it can be written.

    Removes what a killed process left half-written, and nothing else.

    Args:
        directory: the folder.
        keep_last: number of newest checkpoints that are kept.
        keep_every: keep every multiple of this step too.
        keep_best: number of checkpoints with the best metrics[monitor] that are kept too.
        monitor: the metric that decides, such as "val/loss_simple_ema".
        mode: "min" or "max" of the monitor is best; NaN is worst.
        on_damage: a checkpoint that cannot be read back is an error ("stop"); or it is moved to
            {directory}/set_aside with a warning, and the newest whole one before it takes its place
            ("previous").
        needed_bytes: free space to ask for, see state_bytes.

    Raises:
        OSError: the folder cannot be written or its disk is too small.
        ValueError: an option is out of range.
    """
    check_keeping(keep_last, keep_every, keep_best, monitor, mode, on_damage)
    directory = epath.Path(directory).absolute()
    _check_writable(directory, needed_bytes)
    score = functools.partial(_score, monitor=monitor, mode=mode)
    folder = Folder(
        directory,
        functools.partial(_open_manager, directory, keep_last, keep_every, keep_best, score, mode),
    )

    def is_best(metrics: Mapping[str, float]) -> bool:
        if not keep_best or monitor is None or not is_due(metrics, monitor):
            return False
        if monitor not in metrics:
            raise ValueError(
                f"checkpoint watches {monitor!r}, which validation does not report; "
                f"it reports {', '.join(sorted(metrics))}"
            )
        known = [folder.manager.metrics(step) for step in folder.manager.all_steps()]
        scores = sorted(score(m) for m in known if m is not None)
        best = scores[:keep_best] if mode == "min" else scores[-keep_best:]
        if math.isnan(float(metrics[monitor])):
            return False
        own = score(metrics)
        return len(best) < keep_best or (own < best[-1] if mode == "min" else own > best[0])

    return Checkpoints(
        directory,
        save=functools.partial(_save, folder, monitor if keep_best else None),
        restore=functools.partial(_restore, folder, on_damage),
        go_back=functools.partial(_go_back, folder, on_damage),
        all_steps=lambda: sorted(folder.manager.all_steps()),
        latest_step=lambda: folder.manager.latest_step(),
        is_best=is_best,
        wait=folder.settle,
        close=folder.close,
    )


def set_aside_later(directory: str | os.PathLike, step: int) -> list[int]:
    """Move checkpoints after `step` to {directory}/set_aside, to go on from an earlier one.

    To be called by one process, before open_checkpoints. Returns their steps.
    """
    directory = epath.Path(directory)
    later = [saved for saved in saved_steps(directory) if saved > step]
    for saved in later:
        target = directory / SET_ASIDE / str(saved)
        copy = 1
        while target.exists():
            copy += 1
            target = directory / SET_ASIDE / f"{saved}.{copy}"
        target.parent.mkdir(parents=True, exist_ok=True)
        (directory / str(saved)).rename(target)
    return later


def state_bytes(abstract_state: PyTree) -> int:
    """Add up the bytes of all arrays, an upper bound for the size of a checkpoint on disk."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))


def check_keeping(
    keep_last: int,
    keep_every: int | None,
    keep_best: int,
    monitor: str | None,
    mode: str,
    on_damage: str,
) -> None:
    """Raise ValueError for options of open_checkpoints that are out of range."""
    for name, value, least in (
        ("keep_last", keep_last, 1),
        ("keep_every", keep_every, 1),
        ("keep_best", keep_best, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} = {value} should be at least {least}")
    for name, value, choices in (("mode", mode, _WORST), ("on_damage", on_damage, _ON_DAMAGE)):
        if value not in choices:
            raise ValueError(f"{name} = {value!r} is unknown; choose from {', '.join(choices)}")
    if keep_best and monitor is None:
        raise ValueError(f"keep_best = {keep_best} needs a monitor such as 'val/loss_simple_ema'")


def _score(metrics: Mapping[str, float], *, monitor: str | None, mode: str) -> float:
    value = float(metrics[monitor]) if monitor is not None else math.nan
    return _WORST[mode] if math.isnan(value) else value


def _open_manager(directory, keep_last, keep_every, keep_best, score, mode):
    policies: list[Any] = [checkpoint_managers.LatestN(keep_last)]
    if keep_every is not None:
        policies.append(checkpoint_managers.EveryNSteps(keep_every))
    if keep_best:
        policies.append(
            checkpoint_managers.BestN(
                get_metric_fn=score,
                reverse=mode == "min",
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        best_fn=score if keep_best else None,  # without it Orbax does not write the metrics
        best_mode=mode,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
    )
    try:
        return ocp.CheckpointManager(directory, options=options)
    except json.JSONDecodeError as error:
        names = [str(path) for path in directory.glob("*/metrics/metrics") if not _is_json(path)]
        raise DamagedCheckpoint(
            f"{', '.join(sorted(names))} is damaged; delete it, and its checkpoint counts as not "
            "validated"
        ) from error


def _is_json(path: epath.Path) -> bool:
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return True


def _save(folder: Folder, monitor, step, state, metadata, metrics=None) -> bool:
    try:
        folder.settle()
    except SaveFailed as error:
        _log.warning("%s; training goes on, and the next checkpoint is tried", error)
    scored = metrics if metrics is not None and monitor in metrics else None
    if step in folder.manager.all_steps():
        if scored is not None:
            _add_metrics(folder, step, scored)
        return False
    latest = folder.manager.latest_step()
    if latest is not None and step < latest:
        raise ValueError(
            f"cannot save step {step} in {folder.directory}: it holds the later step {latest}, "
            "which belongs to another continuation of this run; go_back moves it out of the way"
        )
    # Reading the state's buffers is the one transfer that a save is for.
    with jax.transfer_guard("allow"):
        record = {
            "format": VERSIONS[-1],
            "metadata": dict(metadata),
            "checksums": checksums(state),
        }
        try:
            json.dumps(record)  # Orbax would find out after it had begun to write
        except TypeError as error:
            raise SaveFailed(f"cannot save step {step} in {folder.directory}: {error}") from error
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(record)
        )
        return folder.save(step, items, scored)


def _add_metrics(folder: Folder, step: int, metrics: Mapping[str, float]) -> None:
    # The step was saved before it was validated; Orbax offers no way to add its metrics.
    place = folder.directory / str(step)
    if jax.process_index() == 0 and not (place / "metrics").exists():
        partial = place / f"metrics{PARTIAL}"
        partial.mkdir(exist_ok=True)
        (partial / "metrics").write_text(json.dumps(metrics))
        partial.rename(place / "metrics")
    wait_for_all(f"metrics of {place}")
    folder.manager.reload()


def _restore(folder: Folder, on_damage, abstract_state, step=None):
    folder.settle()
    try:
        return restore_state(folder.directory, abstract_state, step)
    except DamagedCheckpoint as error:
        if error.whole is None:
            raise
        if on_damage == "stop":
            raise DamagedCheckpoint(
                f"{error}; on_damage = 'previous' goes on from there", error.whole
            ) from error
        _log.warning("%s, which is used; later ones are moved to set_aside", error)
        return _go_back(folder, on_damage, abstract_state, error.whole)


def _go_back(folder: Folder, on_damage, abstract_state, step):
    directory = folder.directory
    name = step if isinstance(step, str) else name_of(directory, step)
    if isinstance(name, str):
        found = restore_state(directory, abstract_state, name)
    else:
        found = _restore(folder, on_damage, abstract_state, name)
    if jax.process_index() == 0:
        if isinstance(name, str):
            set_aside_later(directory, number_of(name) - 1)
            (directory / name).rename(directory / str(number_of(name)))
        else:
            set_aside_later(directory, name)
    wait_for_all(f"checkpoints set aside in {directory}")
    folder.manager.reload()
    return found


def _check_writable(directory: epath.Path, needed_bytes: int) -> None:
    probe = directory / f".probe-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(_PROBE_BYTES))
        probe.unlink()
        free = free_bytes(directory)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write checkpoints to {directory}: {reason}") from error
    if free is not None and free < needed_bytes:
        raise OSError(
            f"cannot write checkpoints to {directory}: one needs up to {needed_bytes / 2**30:.2f} "
            f"GiB and {free / 2**30:.2f} GiB are free"
        )
