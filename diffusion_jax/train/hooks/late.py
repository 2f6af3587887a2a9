"""Read metrics one step late, an interval at a time, for all hooks that look at numbers."""

import collections
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from diffusion_jax.train.loop import MAX_IN_FLIGHT, Event, Hook, Stop, check_every
from diffusion_jax.types import PyTree


class Interval(NamedTuple):
    """Steps that are done, with their metrics on the host.

    steps, metrics: one entry a step, in order.
    seconds: how long the last timed_steps of them took; the run's first step, which compiles, is
        not timed.
    data_wait: for how many of these seconds the host waited for batches.
    attached: what `attach` gave for the last step.
    gaps: seconds between one step and the next as the host sees them, other hooks included. The
        loop waits until step n - MAX_IN_FLIGHT is done, so they are the seconds between
        completions; the first steps of a run, which the loop does not wait for, have none.
    """

    steps: list[int]
    metrics: list[dict[str, Any]]
    seconds: float
    timed_steps: int
    data_wait: float
    attached: PyTree
    gaps: list[float]


class _Pending(NamedTuple):
    # The parts of an Event that may be kept: its state is donated, its batch is large.
    step: int
    metrics: PyTree
    data_wait: float
    gap: float | None


def late(
    use: Callable[[Interval], Stop | None],
    *,
    every: int,
    attach: Callable[[int], PyTree] | None = None,
) -> Hook:
    """Make a hook that calls use(interval) for steps 1..every, every+1..2 every, ... and the rest.

    The call for steps up to n comes when step n+1 was dispatched, so the device never waits for it.
    attach(n) is called when step n was dispatched and may return arrays still on the device.
    A Stop that `use` returns ends the training.
    """
    check_every(every)
    pending: list[_Pending] = []
    attached: PyTree = None
    since: tuple[int, float] | None = None  # the step and the time that the next interval begins
    clocks: collections.deque[float] = collections.deque(maxlen=MAX_IN_FLIGHT + 2)

    def add(event: Event) -> None:
        nonlocal attached
        clocks.append(time.perf_counter())
        gap = clocks[-1] - clocks[-2] if len(clocks) == clocks.maxlen else None
        pending.append(_Pending(event.step, event.metrics, event.data_wait, gap))
        if attach is not None and event.step % every == 0:
            attached = attach(event.step)

    def flush() -> Stop | None:
        nonlocal attached, since
        metrics, extra = jax.device_get(([entry.metrics for entry in pending], attached))
        last, now = pending[-1].step, time.perf_counter()
        first, then = since or (last, now)
        wait = sum(entry.data_wait for entry in pending if entry.step > first)
        gaps = [entry.gap for entry in pending if entry.gap is not None]
        steps = [entry.step for entry in pending]
        pending.clear()
        attached, since = None, (last, now)
        return use(Interval(steps, metrics, now - then, last - first, wait, extra, gaps))

    def act(event: Event) -> Stop | None:
        nonlocal since
        if pending and since is None:
            jax.block_until_ready(pending[0].metrics)
            since = (pending[0].step, time.perf_counter())
        stop = flush() if pending and pending[-1].step % every == 0 else None
        add(event)
        return stop

    def end(event: Event, stop: Stop | None) -> Stop | None:
        nonlocal attached
        if not pending or pending[-1].step != event.step:
            add(event)
        if attach is not None and event.step % every != 0:
            attached = attach(event.step)
        return flush()

    return Hook(lambda step: True, act, end)
