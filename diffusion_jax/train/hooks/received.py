"""Receive the signals of a process from the first line of a run to the last byte of its save.

Synopsis:

    with handle_signals() as received:
        with interruptible(received):
            ...                                 # before the first step: a signal ends it at once
        hooks = [..., signal_hook(received, save=checkpoint_hook.end)]
        train(...)                              # here and in the last save signals are noted
        with interruptible(received):
            ...                                 # after the last save

This module imports nothing heavy, so that the handlers are there before JAX is.
"""

import collections
import contextlib
import faulthandler
import os
import pdb
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, final

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STDERR = 2  # the descriptor: a handler must not meet a half-done write of sys.stderr
_FIRST = b"\nInterrupted: saving after this step.\n"
_SECOND = b"\nStill saving. Press Ctrl-C once more to quit at once and lose what is not saved.\n"


class Interrupted(KeyboardInterrupt):
    """A signal that ends a run came where there is nothing to save; holds its name."""


@final
class Received(collections.deque[int]):
    """Signals that came and were not acted on yet, oldest first."""

    interruptible = False


@contextlib.contextmanager
def interruptible(received: Received) -> Iterator[None]:
    """Let a signal that ends the run raise Interrupted at once, and one that came before too.

    This is for the time before the first step, for waits for a batch, and after the last save.
    """
    stops = [number for number in received if number in STOPS]
    if stops:
        raise Interrupted(signal.Signals(max(stops)).name)
    with _set(received, interruptible=True):
        yield


def interruptible_batches(batches: Iterable[Any], received: Received) -> Iterator[Any]:
    """Yield the batches; a signal that ends the run does not wait for one that does not come."""
    source = iter(batches)
    while True:
        with interruptible(received):
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch


@contextlib.contextmanager
def handle_signals() -> Iterator[Received]:
    """Note signals in the deque that it yields, until the block is left; SIGUSR2 acts at once.

    Inside of another such block it yields the deque of the outer one. A SIGHUP that the process was
    started to ignore (nohup) is still ignored. Only the main thread of a process can receive
    signals: elsewhere the deque stays empty.
    """
    note = signal.getsignal(signal.SIGTERM)
    if isinstance(note, _Note):
        with _set(note.received, interruptible=False):
            yield note.received
        return
    note = _Note()
    if threading.current_thread() is not threading.main_thread():
        yield note.received
        return
    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGUSR1, *STOPS)
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    with _stacks_on_usr2() as shown:
        before[signal.SIGUSR2] = signal.signal(signal.SIGUSR2, lambda *at: _debug(at[1], shown))
        try:
            yield note.received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _stacks_on_usr2() -> Iterator[threading.Event]:
    """Write the stacks of all threads on SIGUSR2, then set the event that is yielded.

    A thread does it, so the stacks come even when the main thread is deep in C++. It holds Python's
    lock: a signal handler in C does not, and reading the stacks of threads that move can crash.
    """
    shown = threading.Event()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    old = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def show() -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGUSR2:
                faulthandler.dump_traceback(file=_STDERR, all_threads=True)
                shown.set()

    thread = threading.Thread(target=show, name="stacks", daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        signal.set_wakeup_fd(old)
        theirs.close()  # the thread reads the end of the stream
        thread.join(timeout=1.0)
        ours.close()


@final
class _Note:
    """A handler that notes signals; the third Ctrl-C ends the process, as the second one said."""

    def __init__(self) -> None:
        """Begin with no signal."""
        self.received = Received()
        self._told = iter((_FIRST, _SECOND))

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self.received.interruptible and number in STOPS:
            raise Interrupted(signal.Signals(number).name)
        if number == signal.SIGINT:
            text = next(self._told)
            if text == _SECOND:
                # The default action does not wait for Python, which may be deep in a compilation.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(_STDERR, text)


@contextlib.contextmanager
def _set(received: Received, *, interruptible: bool) -> Iterator[None]:
    before, received.interruptible = received.interruptible, interruptible
    try:
        yield
    finally:
        received.interruptible = before


def _debug(frame: FrameType | None, shown: threading.Event) -> None:
    shown.wait(timeout=5.0)
    shown.clear()
    if _has_terminal():
        pdb.Pdb(nosigint=True).set_trace(frame)  # Ctrl-C keeps its meaning


def _has_terminal() -> bool:
    """Return whether somebody can type; to read would stop a process in the background."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # a terminal that is not this process's own
        return False
