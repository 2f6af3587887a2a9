"""Checkpoints of a run: save in the background, restore exactly, and say what is wrong.

Synopsis:

    checkpoints = open_checkpoints(workdir / "checkpoints", keep_last=2)
    checkpoints.save(step, state, {"next_batch": step, "seed": 0, "config": {...}})
    state, metadata = checkpoints.restore(abstract_state)
    checkpoints.close()

On disk (Orbax): {directory}/{step}/state and {directory}/{step}/metadata, the caller's metadata and
one checksum per array. The average of the parameters is in the state, inside opt_state; load_params
reads it, or the parameters, alone. Nothing here falls back to another checkpoint unless told so
(on_damage), and nothing is overwritten: a checkpoint that is in the way is moved aside.
"""

import contextlib
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from diffusion_jax.train.checkpoints.checksums import checksums
from diffusion_jax.train.checkpoints.reading import (
    DamagedCheckpoint,
    load_metadata,
    load_mutable,
    load_params,
    resolve_checkpoint,
    restore_state,
    saved_steps,
)
from diffusion_jax.types import PyTree

__all__ = [
    "Checkpoints",
    "DamagedCheckpoint",
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
_PARTIAL = ".orbax-checkpoint-tmp"
_PROBE_BYTES = 1 << 16
_WORST = {"min": math.inf, "max": -math.inf}
_ON_DAMAGE = ("stop", "previous")


class Checkpoints(NamedTuple):
    """An open folder of checkpoints.

    save(step, state, metadata, metrics=None) -> bool: start saving and return as soon as the state
    may be donated; False when the step is there already, which then only gets the metrics that it
    lacks. restore(abstract_state, step=None): restore_state, after on_damage. all_steps() and
    latest_step() count a save that is still under way. is_best(metrics): whether a checkpoint with
    these metrics would be among the best to keep; ValueError when the monitor is not one of them.
    wait() returns when all is on disk and raises what went wrong; close() waits and closes.
    """

    directory: epath.Path
    save: Callable[..., bool]
    restore: Callable[..., tuple[PyTree, dict[str, Any]]]
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
    mode: str = "min",
    on_damage: str = "stop",
    needed_bytes: int = 0,
) -> Checkpoints:
    """Open, or make, a folder to save checkpoints in, and find out now whether it can be written.

    Kept are the newest keep_last, every multiple of keep_every, and the keep_best with the best
    metrics[monitor]; the newest is always among them. mode: "min" or "max" of the monitor is best;
    NaN is worst. on_damage: a checkpoint that cannot be read back is an error ("stop"), or is moved
    to {directory}/set_aside with a warning, and the newest whole one before it takes its place
    ("previous"). needed_bytes: free space to ask for, see state_bytes.
    What a killed process left half-written is removed; nothing else is.
    Raises OSError when the folder cannot be written or is too small, ValueError for bad options.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last = {keep_last} should be at least 1")
    if mode not in _WORST:
        raise ValueError(f"mode = {mode!r} is unknown; choose one of {', '.join(_WORST)}")
    if on_damage not in _ON_DAMAGE:
        raise ValueError(
            f"on_damage = {on_damage!r} is unknown; choose one of {', '.join(_ON_DAMAGE)}"
        )
    if keep_best and monitor is None:
        raise ValueError(f"keep_best = {keep_best} needs a monitor such as 'val/loss_simple_ema'")
    directory = epath.Path(directory).absolute()
    _check_writable(directory, needed_bytes)
    _remove_partial(directory)
    score = functools.partial(_score, monitor=monitor, mode=mode)
    manager = _open_manager(directory, keep_last, keep_every, keep_best, score, mode)

    def is_best(metrics: Mapping[str, float]) -> bool:
        if not keep_best or monitor is None:
            return False
        if monitor not in metrics:
            raise ValueError(
                f"checkpoint watches {monitor!r}, which validation does not report; "
                f"it reports {', '.join(sorted(metrics))}"
            )
        known = [manager.metrics(step) for step in manager.all_steps()]
        scores = sorted(score(m) for m in known if m is not None)
        best = scores[:keep_best] if mode == "min" else scores[-keep_best:]
        if math.isnan(float(metrics[monitor])):
            return False
        own = score(metrics)
        return len(best) < keep_best or (own < best[-1] if mode == "min" else own > best[0])

    return Checkpoints(
        directory,
        save=functools.partial(_save, manager, directory, monitor if keep_best else None),
        restore=functools.partial(_wait_and_restore, manager, directory, on_damage),
        all_steps=lambda: sorted(manager.all_steps()),
        latest_step=manager.latest_step,
        is_best=is_best,
        wait=manager.wait_until_finished,
        close=manager.close,
    )


def set_aside_later(directory: str | os.PathLike, step: int) -> list[int]:
    """Move checkpoints after `step` to {directory}/set_aside, to go on from an earlier one.

    To be called before open_checkpoints, by one process. Returns their steps.
    """
    directory = epath.Path(directory)
    later = [saved for saved in saved_steps(directory) if saved > step]
    for saved in later:
        target = directory / "set_aside" / str(saved)
        copy = 1
        while target.exists():
            copy += 1
            target = directory / "set_aside" / f"{saved}.{copy}"
        target.parent.mkdir(parents=True, exist_ok=True)
        (directory / str(saved)).rename(target)
    return later


def state_bytes(abstract_state: PyTree) -> int:
    """Add up the bytes of all arrays, an upper bound for the size of a checkpoint on disk."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_state))


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


def _save(manager, directory, monitor, step, state, metadata, metrics=None) -> bool:
    scored = metrics if metrics is not None and monitor in metrics else None
    if step in manager.all_steps():
        if scored is not None:
            _add_metrics(manager, directory / str(step), scored)
        return False
    latest = manager.latest_step()
    if latest is not None and step < latest:
        raise ValueError(
            f"cannot save step {step} in {directory}: it holds the later step {latest}, which "
            "belongs to another continuation of this run; set_aside_later moves it out of the way"
        )
    # Reading the state's buffers is the one transfer that a save is for.
    with jax.transfer_guard("allow"):
        record = {"metadata": dict(metadata), "checksums": checksums(state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(record)
        )
        try:
            with _without("did not provide metrics"):  # as most steps do, rightly
                return manager.save(step, args=items, metrics=scored, force=True)
        except Exception as error:
            error.add_note(f"while saving a checkpoint of step {step} in {directory}")
            raise


def _add_metrics(manager, folder: epath.Path, metrics: Mapping[str, float]) -> None:
    # Of a step that was saved before it was validated; Orbax offers no way to do this.
    manager.wait_until_finished()
    if jax.process_index() == 0 and not (folder / "metrics").exists():
        partial = folder / f"metrics{_PARTIAL}"
        partial.mkdir(exist_ok=True)
        (partial / "metrics").write_text(json.dumps(metrics))
        partial.rename(folder / "metrics")
    _wait_for_all(f"metrics of {folder}")
    manager.reload()


@contextlib.contextmanager
def _without(message: str) -> Iterator[None]:
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return message not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _wait_and_restore(manager, directory, on_damage, abstract_state, step=None):
    manager.wait_until_finished()
    try:
        return restore_state(directory, abstract_state, step)
    except DamagedCheckpoint as error:
        if error.whole is None:
            raise
        if on_damage == "stop":
            raise DamagedCheckpoint(
                f"{error}; on_damage = 'previous' goes on from there", error.whole
            ) from error
        _log.warning("%s, which is used; later ones are moved to set_aside", error)
        whole = error.whole
    if jax.process_index() == 0:
        set_aside_later(directory, whole)
    _wait_for_all(f"damage in {directory}")
    manager.reload()
    return restore_state(directory, abstract_state, whole)


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(what)


def _check_writable(directory: epath.Path, needed_bytes: int) -> None:
    probe = directory / f".probe-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(_PROBE_BYTES))
        probe.unlink()
        free = shutil.disk_usage(directory).free if directory.is_dir() else None
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write checkpoints to {directory}: {reason}") from error
    if free is not None and free < needed_bytes:
        raise OSError(
            f"cannot write checkpoints to {directory}: one needs up to {needed_bytes / 2**30:.2f} "
            f"GiB and {free / 2**30:.2f} GiB are free"
        )


def _remove_partial(directory: epath.Path) -> None:
    # Orbax's own clean-up runs in the background, where it could meet a save of the same step.
    if jax.process_index() == 0:
        for path in directory.iterdir():
            if _PARTIAL in path.name:
                path.rmtree()
