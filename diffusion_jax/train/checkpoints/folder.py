"""A folder that Orbax writes checkpoints into in the background, and that survives failed saves."""

import contextlib
import logging
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.train.checkpoints.reading import anywhere

_log = logging.getLogger(__name__)
PARTIAL = ".orbax-checkpoint-tmp"
_WAIT_SECONDS = 1800.0  # Orbax itself gives up writing after 1200
_REMOVE_SECONDS = 10.0
_LOOK_SECONDS = 0.01
_NOWHERE = (0, 0)


class SaveFailed(OSError):
    """A checkpoint that could not be written; says why, and how much space is free."""


@final
class Folder:
    """Orbax's manager of a folder, made anew after a save that failed.

    A manager repeats the error of a failed save at every later call, and counts the failed step as
    saved. Orbax also logs each error several times, with stacks; the one sentence here replaces it.
    """

    def __init__(self, directory: epath.Path, make: Callable[[], ocp.CheckpointManager]) -> None:
        """Remove what a killed process left half-written, and open the folder with make()."""
        self.directory = directory
        self._make = make
        self._saving: int | None = None
        self._place: tuple[int, int] | None = None
        self._refused: OSError | None = None
        self._quiet = contextlib.ExitStack()
        self._renew()
        self._quiet.enter_context(_without_stacks())

    def save(self, step: int, items: ocp.args.Composite, metrics: Mapping | None) -> bool:
        """Start to save; return False if the step is there, SaveFailed if it cannot be started.

        A folder that nothing can be written in is an error of the background, too: Orbax would wait
        for minutes until its threads have made the checkpoint's own folder.
        """
        self._saving = step
        refused = _refusal(self.directory)
        if anywhere(refused is not None):
            self._refused = refused or OSError("another process cannot write there")
            return True
        try:
            return self.manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def settle(self) -> None:
        """Wait for the save under way; SaveFailed if it failed, in this process or another.

        Afterwards the folder can be written again. All processes have to call this together.
        """
        try:
            self._wait()
        except Exception as error:
            anywhere(True)
            raise self._failed(error) from error
        if anywhere(False):
            raise self._failed(None)
        if anywhere(self._identity() != self._place):
            if self._place != _NOWHERE:
                _log.warning(
                    "%s is gone (deleted, moved or unmounted): checkpoints go on in a new folder",
                    self.directory,
                )
            self._try_to_renew()

    def close(self) -> None:
        """Wait for the save under way and close; SaveFailed if it failed."""
        try:
            self._wait()
        except Exception as error:
            raise SaveFailed(self._sentence(error)) from error
        finally:
            self._quiet.close()
        self.manager.close()

    def _wait(self) -> None:
        until = time.monotonic() + _WAIT_SECONDS
        while self.manager.is_saving_in_progress():
            if time.monotonic() > until:
                raise TimeoutError(f"it did not end within {_WAIT_SECONDS:.0f} s")
            time.sleep(_LOOK_SECONDS)
        self.manager.wait_until_finished()
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused

    def _failed(self, error: Exception | None) -> SaveFailed:
        sentence = self._sentence(error)
        self._try_to_renew()
        return SaveFailed(sentence)

    def _try_to_renew(self) -> None:
        try:
            self._renew()
        except OSError:
            self._place = _NOWHERE  # the next save says why, or finds it mended

    def _identity(self) -> tuple[int, int] | None:
        """Tell one local folder from another that has its path; None where there is none."""
        try:
            status = os.stat(self.directory)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _sentence(self, error: Exception | None) -> str:
        reason = "another process failed" if error is None else _reason(error)
        free = free_bytes(self.directory)
        space = "" if free is None else f" ({free / 2**30:.2f} GiB are free)"
        return f"cannot save step {self._saving} in {self.directory}: {reason}{space}"

    def _renew(self) -> None:
        # Orbax's own clean-up runs in the background, where it could meet a save of the same step.
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if PARTIAL in path.name:
                    _remove(path)
        wait_for_all(f"partial checkpoints in {self.directory}")
        self.manager = self._make()
        self._place = self._identity()


def wait_for_all(what: str) -> None:
    """Wait until every process is here; what: the same name in all."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(what)


def _refusal(directory: epath.Path) -> OSError | None:
    """Try to make a folder in it, as a save does; return the error if that is not possible."""
    probe = directory / f".probe-{jax.process_index()}"
    try:
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        return error
    return None


def free_bytes(directory: epath.Path) -> int | None:
    """Free space of the disk that a folder is on; None where that is not known."""
    return shutil.disk_usage(directory).free if directory.is_dir() else None


def _remove(path: epath.Path) -> None:
    """Remove a folder that threads of a failed save may still write into for a moment."""
    until = time.monotonic() + _REMOVE_SECONDS
    while True:
        try:
            return path.rmtree()
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(_LOOK_SECONDS)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", str(error))  # of TensorStore, after long paths
    if number is not None:
        return os.strerror(int(number[1]))
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _without_stacks() -> Iterator[None]:
    """Drop the stack traces that Orbax and asyncio log for errors that are reported here.

    TensorStore reports to event loops that Orbax has closed after an error. asyncio reports an
    error that nobody asked for when its task is collected, which may be long after the folder is
    closed: the exception of the failed save can still hold the task. So the filter of its records
    stays, and drops nothing but errors that went through Orbax, and those without a stack that
    name a half-written checkpoint: TensorStore puts an error into a future of its own, and the
    loop of a save ends with the first error, before it has asked for those that arrive meanwhile.
    """
    before = sys.unraisablehook

    def unraisable(args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":
            before(args)

    def is_news(record: logging.LogRecord) -> bool:
        told_here = record.exc_info and "orbax" in record.pathname
        return not told_here and "did not provide metrics" not in record.getMessage()

    absl = logging.getLogger("absl")
    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
    logging.getLogger("asyncio").addFilter(_is_not_of_a_save)  # adding it again does nothing
    absl.addFilter(is_news)
    try:
        yield
    finally:
        absl.removeFilter(is_news)
        if sys.unraisablehook is unraisable:
            sys.unraisablehook = before


def _is_not_of_a_save(record: logging.LogRecord) -> bool:
    """Drop the record of an error of a save that nobody asked its task for, and keep all others."""
    if not record.exc_info or "exception was never retrieved" not in record.getMessage():
        return True
    _, error, stack = record.exc_info
    in_orbax = any("orbax" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(stack))
    return not in_orbax and PARTIAL not in str(error)
