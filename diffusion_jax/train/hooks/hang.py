"""Say what a training process is doing when no step gets done for a long time.

Synopsis:

    with watch_hangs(seconds=600) as hook:
        train(..., hooks=[hook, ...])
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

import jax

from diffusion_jax.train.loop import Event, Hook

_STDERR = 2  # the descriptor: sys.stderr may be locked by what hangs
_LOOK_SECONDS = 5.0


@contextlib.contextmanager
def watch_hangs(*, seconds: float = 600.0) -> Iterator[Hook]:
    """Yield the hook that notes every step; the watch ends with the block.

    When no step was done for `seconds`, the step, the time and the stacks of all threads go to
    stderr, once until the next step; the process goes on. The watch starts with the first step
    that is dispatched, so the first compilation is not seen. Validation and images count as a part
    of the step that they follow. Every process watches itself.
    Raises ValueError unless seconds > 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds = {seconds} should be above 0")
    latest: tuple[int, float] | None = None  # the last step and its time
    over = threading.Event()

    def act(event: Event) -> None:
        nonlocal latest
        latest = (event.step, time.monotonic())

    def watch() -> None:
        reported = None
        while not over.wait(min(seconds / 4, _LOOK_SECONDS)):
            last = latest
            if last is None or last == reported:
                continue
            waited = time.monotonic() - last[1]
            if waited >= seconds:
                _tell(last[0], waited)
                reported = last

    thread = threading.Thread(target=watch, name="watch_hangs", daemon=True)
    thread.start()
    try:
        yield Hook(lambda step: True, act)
    finally:
        over.set()
        thread.join(_LOOK_SECONDS)  # it may hang itself where nobody reads stderr


def _tell(step: int, waited: float) -> None:
    who = f" in process {jax.process_index()}" if jax.process_count() > 1 else ""
    text = f"\nno step was done for {waited:.0f} s after step {step}{who}; all threads:\n"
    os.write(_STDERR, text.encode())
    faulthandler.dump_traceback(file=_STDERR, all_threads=True)
