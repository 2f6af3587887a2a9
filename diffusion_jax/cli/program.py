"""The name by which this program was called, for usage lines and advice, and its exit codes."""

import pathlib
import sys

# Stopped by a signal, and nothing is lost: the same command goes on (sysexits.h, EX_TEMPFAIL).
EXIT_SIGNAL = 75
EXIT_NOT_A_NUMBER = 3  # a metric was NaN or infinite; the message names the last good checkpoint


def program_name() -> str:
    """Return what a user types before a command: launch.py, the module, or the installed script."""
    called = pathlib.Path(sys.argv[0]).name
    if called == "launch.py":
        return "python launch.py"
    return "python -m diffusion_jax" if called == "__main__.py" else "diffusion-jax"
