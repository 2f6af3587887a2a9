"""The name by which this program was called, for usage lines and advice."""

import pathlib
import sys


def program_name() -> str:
    """Return what a user types before a command: launch.py, the module, or the installed script."""
    called = pathlib.Path(sys.argv[0]).name
    if called == "launch.py":
        return "python launch.py"
    return "python -m diffusion_jax" if called == "__main__.py" else "diffusion-jax"
