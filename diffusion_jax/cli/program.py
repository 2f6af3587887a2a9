"""The name by which this program was called, for usage lines and advice, and its exit codes."""

import pathlib
import sys

from diffusion_jax.train.hooks.received import Interrupted

# Stopped by a signal, and nothing is lost: the same command goes on (sysexits.h, EX_TEMPFAIL).
EXIT_SIGNAL = 75
EXIT_NOT_A_NUMBER = 3  # a metric was NaN or infinite; the message names the last good checkpoint


def program_name() -> str:
    """Return what a user types before a command: launch.py, the module, or the installed script."""
    called = pathlib.Path(sys.argv[0]).name
    if called == "launch.py":
        return "python launch.py"
    return "python -m diffusion_jax" if called == "__main__.py" else "diffusion-jax"


def exit_code(error: BaseException) -> int:
    """Return the exit code for an exception: 2 for a sentence of this package, 1 for a traceback.

    A sentence for the user is raised by this package; the traceback of an error from deeper down is
    worth more than its message.
    """
    if isinstance(error, Interrupted):
        return EXIT_SIGNAL
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return 1
    raised_in = pathlib.Path(traceback.tb_frame.f_code.co_filename).resolve()
    return 2 if raised_in.is_relative_to(pathlib.Path(__file__).resolve().parents[1]) else 1
