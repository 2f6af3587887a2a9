"""What --debug does around the training of a run."""

import contextlib
import pdb
import sys
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def debugging(debug: bool) -> Iterator[None]:
    """With --debug, stop at the first NaN, and open a debugger where an exception was raised."""
    if not debug:
        yield
        return
    with jax.debug_nans(True):
        try:
            yield
        except Exception:
            if sys.stdin.isatty():
                pdb.post_mortem()
            raise
