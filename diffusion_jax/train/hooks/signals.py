"""Signals of a training process: save now, save and exit, show what it is doing.

    SIGUSR1         save a checkpoint and go on
    SIGTERM         save and exit (what a cluster sends before it takes the machine)
    SIGHUP          save and exit (the terminal was closed)
    SIGINT, Ctrl-C  save and exit; a second one ends the process at once, without saving
    SIGUSR2         write the Python stacks of all threads to stderr; a process in the foreground of
                    a terminal then enters the debugger, where "continue" goes on

Synopsis:

    with handle_signals() as received:
        with interruptible(received):
            ...                                 # what is ready before the first step
        hooks = [..., signal_hook(received, save=checkpoint_hook.end)]
        train(...)

A handler only notes its signal; the hook acts on it between two steps. The debugger opens where the
main thread is, once it is back in Python.
"""

import collections
import contextlib
import faulthandler
import os
import pdb
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.train.loop import Event, Hook, Stop, check_every

_STDERR = 2  # the descriptor: a handler must not meet a half-done write of sys.stderr
_ONCE_MORE = b"\nInterrupted: saving after this step. Press Ctrl-C again to quit at once.\n"


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal that ends a run came where there is nothing to save; holds its name."""


@final
class Received(collections.deque[int]):
    """Signals that came and were not acted on yet, oldest first."""

    interruptible = False


@contextlib.contextmanager
def interruptible(received: Received) -> Iterator[None]:
    """Let a signal that ends the run raise Interrupted at once, and one that came before too.

    This is for the time before the first step and after the last save.
    """
    stops = [number for number in received if number in STOPS]
    if stops:
        raise Interrupted(signal.Signals(max(stops)).name)
    received.interruptible = True
    try:
        yield
    finally:
        received.interruptible = False


@contextlib.contextmanager
def handle_signals() -> Iterator[Received]:
    """Note signals in the deque that it yields, until the block is left; SIGUSR2 acts at once.

    A SIGHUP that the process was started to ignore (nohup) is still ignored. Only the main thread
    can do this; ValueError elsewhere.
    """
    received = Received()

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if received.interruptible and number in STOPS:
            raise Interrupted(signal.Signals(number).name)
        if number == signal.SIGINT:
            os.write(_STDERR, _ONCE_MORE)
            # The default action does not wait for Python, which may be deep in a compilation.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGUSR1, *STOPS)
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, _debug)
    # The stacks come at once, even from a process that is deep in C++; then comes _debug.
    faulthandler.register(signal.SIGUSR2, file=_STDERR, all_threads=True, chain=True)
    try:
        yield received
    finally:
        faulthandler.unregister(signal.SIGUSR2)
        for number, handler in before.items():
            signal.signal(number, handler)


def _debug(number: int, frame: FrameType | None) -> None:
    if _has_terminal():
        pdb.Pdb(nosigint=True).set_trace(frame)  # Ctrl-C keeps its meaning


def _has_terminal() -> bool:
    """Return whether somebody can type; to read would stop a process in the background."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # a terminal that is not this process's own
        return False


def signal_hook(
    received: collections.deque[int],
    save: Callable[[Event, Stop | None], Any],
    *,
    agree_every: int = 10,
) -> Hook:
    """Make the hook that acts on received signals; `save` is the `end` of the checkpoint hook.

    SIGUSR1 saves. A signal of STOPS gives a Stop, whose reason is its name, and the `end` of the
    checkpoint hook saves. Several processes compare notes every agree_every steps, so that a signal
    to one of them reaches all at the same step; they read the answer agree_every steps later, when
    it is there without waiting.
    """
    check_every(agree_every, "agree_every")
    if jax.process_count() == 1:
        return Hook(lambda step: True, lambda event: _react(_take(received), event, save))
    asked: list[jax.Array] = []

    def act(event: Event) -> Stop | None:
        answer = np.asarray(jax.device_get(asked.pop())) if asked else np.zeros(2, np.int32)
        asked.append(_maximum_over_processes(_take(received)))
        return _react(answer, event, save)

    return Hook(lambda step: step % agree_every == 0, act)


def _take(received: collections.deque[int]) -> np.ndarray:
    """Empty the deque -> int32 [whether to save, number of the signal that stops or 0]."""
    numbers = [received.popleft() for _ in range(len(received))]
    stops = [number for number in numbers if number != signal.SIGUSR1]
    return np.array([len(stops) < len(numbers), max(stops, default=0)], np.int32)


def _react(
    answer: np.ndarray, event: Event, save: Callable[[Event, Stop | None], Any]
) -> Stop | None:
    wants_save, stop = bool(answer[0]), int(answer[1])
    if stop:
        return Stop(signal.Signals(stop).name)
    return save(event, None) if wants_save else None


def _maximum_over_processes(values: np.ndarray) -> jax.Array:
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    local = np.tile(values, (jax.local_device_count(), 1))
    rows = NamedSharding(mesh, PartitionSpec("device"))
    with jax.transfer_guard_host_to_device("allow"):  # counts as implicit with several processes
        notes = jax.make_array_from_process_local_data(rows, local)
    return jax.jit(_column_maxima, out_shardings=NamedSharding(mesh, PartitionSpec()))(notes)


def _column_maxima(notes: jax.Array) -> jax.Array:
    return notes.max(axis=0)
