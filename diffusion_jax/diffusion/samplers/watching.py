"""Let the host see how far a sampler has come, and stop it between two steps."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import SupportsInt

import numpy as np

# (steps that are done, steps in all) -> whether the next one shall be taken.
Watcher = Callable[[int, int], bool]

_watchers: list[Watcher] = []
_lock = threading.Lock()


@contextlib.contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Have samplers that run with watched=True ask the watcher before each step, one at a time.

    The steps after the first False are left out: x stays as it is.
    """
    with _lock:  # a compiled sampler does not know who called it
        _watchers.append(watcher)
        try:
            yield
        finally:
            _watchers.pop()


def ask(done: SupportsInt, total: SupportsInt) -> np.bool_:
    """Ask the watcher, from the thread of a device; without one every step is taken."""
    return np.bool_(_watchers[-1](int(done), int(total)) if _watchers else True)
