"""Keep snapshots of the longest power average in the run folder, a few at any length of run."""

import logging
import os
import shutil

import jax
from etils import epath

from diffusion_jax.train.checkpoints.folder import wait_for_all
from diffusion_jax.train.checkpoints.reading import saved_steps
from diffusion_jax.train.checkpoints.saving import Checkpoints, open_checkpoints
from diffusion_jax.train.hooks.nan_stop import params_stop
from diffusion_jax.train.loop import Event, Hook, Stop, check_every
from diffusion_jax.train.power_ema import find_tracks, is_snapshot_step, pack

FOLDER = "snapshots"
_log = logging.getLogger(__name__)


def snapshots(directory: str | os.PathLike, *, count: int, every: int) -> Hook:
    """Make the hook: at steps that grow like powers of 1.25 a snapshot is written, see power_ema.

    A snapshot has two bytes a parameter, and no more than `count` are ever in the folder, the one
    that is being written included: the oldest goes first. With 3 that is 1.5 times the parameters
    in float32. They are written in the background, sharded as the parameters are. Which steps have
    one depends on the step alone, so that a run that was killed and goes on has the same; snapshots
    from behind the step at which it goes on are removed first, because it makes them again.

    A snapshot that cannot be written is a warning: averages of other lengths are then less exact.
    """
    check_every(every, "snapshot_every")
    directory = epath.Path(directory).absolute()
    writing: Checkpoints | None = None

    def start(step: int) -> None:
        _remove(directory, [saved for saved in saved_steps(directory) if saved > step])

    def act(event: Event) -> Stop | None:
        nonlocal writing
        bad = params_stop(event.step, event.state.params, None)
        if bad is not None:
            return bad
        settle()
        found = find_tracks(event.state.opt_state)
        assert found is not None  # build_hooks looks
        saved = saved_steps(directory)
        _remove(directory, saved[: max(0, len(saved) - count + 1)])
        try:
            writing = open_checkpoints(directory, keep_last=count)
            with jax.transfer_guard("allow"):
                packed = pack(found.tracks[-1])
            writing.save(event.step, packed, {"seen": int(jax.device_get(found.seen))})
        except OSError as error:
            _warn(event.step, error)
        return None

    def settle() -> None:
        nonlocal writing
        before, writing = writing, None
        if before is not None:
            try:
                before.close()
            except OSError as error:
                _warn(None, error)

    def end(event: Event, stop: Stop | None) -> None:
        settle()

    return Hook(lambda step: count > 0 and is_snapshot_step(step, every), act, end, start)


def _remove(directory: epath.Path, steps: list[int]) -> None:
    if jax.process_index() == 0:
        for step in steps:
            shutil.rmtree(directory / str(step))
    wait_for_all(f"snapshots removed from {directory}")


def _warn(step: int | None, error: OSError) -> None:
    what = "a snapshot" if step is None else f"the snapshot of step {step}"
    _log.warning("%s is not kept (%s); averages of other lengths are less exact", what, error)
