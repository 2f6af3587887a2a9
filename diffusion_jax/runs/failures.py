"""What the end of a command means to the user: its exit code, and an error in one sentence."""

import errno
import pathlib

from diffusion_jax.train.hooks.received import Interrupted

# Stopped by a signal, and nothing is lost: the same command goes on (sysexits.h, EX_TEMPFAIL).
EXIT_SIGNAL = 75
EXIT_NOT_A_NUMBER = 3  # a metric was NaN or infinite; the message names the last good checkpoint

# What the system says of files and disks, which no traceback explains better.
_OF_THE_SYSTEM = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES EPERM EROFS ENOSPC EDQUOT EFBIG EIO ESTALE ENODEV ENXIO ENOTDIR EISDIR ELOOP "
        "ENAMETOOLONG EMFILE ENFILE"
    ).split()
)

_LESS_MEMORY = (
    "fewer or smaller images at once need less (config.train.batch_size, config.train.accumulate, "
    "--batch_size), and config.model.remat in training"
)


def exit_code(error: BaseException) -> int:
    """Return the exit code for an exception: 2 for a sentence of this package, 1 for a traceback.

    A sentence for the user is raised by this package, or by the system for a file or a disk; the
    traceback of any other error from deeper down is worth more than its message.
    """
    if isinstance(error, Interrupted):
        return EXIT_SIGNAL
    if _is_of_memory(error) or (isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM):
        return 2
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return 1
    raised_in = pathlib.Path(traceback.tb_frame.f_code.co_filename).resolve()
    return 2 if raised_in.is_relative_to(pathlib.Path(__file__).resolve().parents[1]) else 1


def sentence_of(error: BaseException) -> str:
    """Return what an exception says to the user: its message, or the file and what is wrong."""
    if _is_of_memory(error):
        lines = str(error).splitlines() or ["MemoryError"]
        return f"the memory is too small for this ({lines[0][:200]}); {_LESS_MEMORY}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return str(error)


def _is_of_memory(error: BaseException) -> bool:
    """Tell whether the memory of the host or of a device was too small."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
        and str(error).startswith("RESOURCE_EXHAUSTED")
    )
