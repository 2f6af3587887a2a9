"""Read metrics one step late, an interval at a time: what all hooks that look at numbers share."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from diffusion_jax.train.loop import MAX_IN_FLIGHT, Event, Hook, Stop
from diffusion_jax.types import PyTree


class Interval(NamedTuple):
    """Steps that are done, with their metrics on the host.

    steps and metrics have one entry a step, in order. seconds is the time that the last timed_steps
    of them took (the run's first step, which compiles, is not timed), data_wait the seconds of
    these that the host waited for batches. attached is what `attach` gave for the last step.
    gaps are the seconds between one step and the next as the host sees them, other hooks included.
    The loop waits until step n - MAX_IN_FLIGHT is done, so from then on they are those between
    completions; the steps of the run before that are left out.
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

    The call for steps up to n comes when step n+1 has been dispatched, so reading stalls nothing.
    attach(n) is called when step n was dispatched and may return arrays still on the device.
    A Stop that `use` returns ends the training.
    """
    if every < 1:
        raise ValueError(f"every = {every} should be at least 1 step")
    pending: list[_Pending] = []
    attached: list[PyTree] = []
    since: list[tuple[int, float]] = []  # the step and the time that the next interval starts from
    clocks: list[float] = []  # of the run's first few steps, then of the last one

    def add(event: Event) -> None:
        clocks.append(time.perf_counter())
        gap = None
        if len(clocks) > MAX_IN_FLIGHT + 1:
            gap = clocks[-1] - clocks[-2]
            del clocks[0]
        pending.append(_Pending(event.step, event.metrics, event.data_wait, gap))
        if attach is not None and event.step % every == 0:
            attached.append(attach(event.step))

    def flush() -> Stop | None:
        steps = [entry.step for entry in pending]
        metrics, extra = jax.device_get(([entry.metrics for entry in pending], attached[:1]))
        start, clock = since[0] if since else (steps[-1], time.perf_counter())
        since[:] = [(steps[-1], time.perf_counter())]
        wait = sum(entry.data_wait for entry in pending if entry.step > start)
        gaps = [entry.gap for entry in pending if entry.gap is not None]
        pending.clear()
        attached.clear()
        seconds = since[0][1] - clock
        extra = extra[0] if extra else None
        return use(Interval(steps, metrics, seconds, steps[-1] - start, wait, extra, gaps))

    def act(event: Event) -> Stop | None:
        if pending and not since:
            jax.block_until_ready(pending[0].metrics)
            since.append((pending[0].step, time.perf_counter()))
        stop = flush() if pending and pending[-1].step % every == 0 else None
        add(event)
        return stop

    def end(event: Event, stop: Stop | None) -> Stop | None:
        if not pending or pending[-1].step != event.step:
            add(event)
        if attach is not None and event.step % every != 0:
            attached.append(attach(event.step))
        return flush()

    return Hook(lambda step: True, act, end)
