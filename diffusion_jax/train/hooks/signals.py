"""Act on the signals of a training process: save now, save and exit, show what it is doing.

    SIGUSR1         save a checkpoint and go on
    SIGTERM         save and exit (what a cluster sends before it takes the machine)
    SIGHUP          save and exit (the terminal was closed)
    SIGINT, Ctrl-C  save and exit; a third one ends the process at once, without saving
    SIGUSR2         write the Python stacks of all threads to stderr; a process in the foreground of
                    a terminal then enters the debugger, where "continue" goes on

A handler only notes its signal (received.py); the hook acts on it between two steps. The debugger
opens where the main thread is, once it is back in Python.
"""

import collections
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.train.loop import Event, Hook, Stop, check_every


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
