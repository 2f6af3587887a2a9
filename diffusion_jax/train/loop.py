"""The training loop: state, metrics = train_step(state, batch), and hooks in between.

Synopsis:

    hooks = [nan_stop(...), scalars(...), images(...), checkpoint(...)]
    state, stop = train(state, train_step, batches, hooks, num_steps=10_000)

The order of one step, which exact resume and a busy device depend on:

1. the host waits for batch n (timed: Event.data_wait);
2. step n is dispatched; the device works on it while the host goes on;
3. the host waits until step n - MAX_IN_FLIGHT is done, so that the device always has work queued
   and the host cannot run away from it;
4. every hook that is due at n acts on state n, before step n+1 takes (donates) its buffers.

Event.metrics are device arrays of a step that is still running. A hook keeps them and reads them
when it is called for step n+1, which is after step n+1 was dispatched (hooks/late.py does this for
all that need it); what it still holds when the loop ends, it reads in `end`. So no metric is lost
and none is waited for.
"""

import collections
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.types import PyTree

MAX_IN_FLIGHT = 2


class Event(NamedTuple):
    """What a hook sees after step `step` was dispatched.

    step: optimizer steps completed, 1 after the first. state: the state after that step; valid
    until the hook returns, because the next step donates it. metrics: scalars of that step on the
    device, not to be read before the next step is dispatched, but by a hook that waits for the
    state anyway (checkpoint). batch: the batch of that step as the iterator gave it (host arrays).
    data_wait: seconds the host waited for that batch.
    """

    step: int
    state: PyTree
    metrics: PyTree
    batch: Any
    data_wait: float


class Stop(NamedTuple):
    """Why a hook ends the training; save=False says that the state is not worth a checkpoint."""

    reason: str
    save: bool = True


def _nothing(event: Event, stop: Stop | None) -> None:
    del event, stop


class Hook(NamedTuple):
    """A pair of functions, and a third for those that hold something back.

    due(step) is pure, so that all hosts agree when they act together. act(event) returns None to go
    on or a Stop. end(event, stop) is called once after the last step, with the event of that step
    and the Stop or None; a Stop that it returns takes the place of the one before.
    """

    due: Callable[[int], bool]
    act: Callable[[Event], Stop | None]
    end: Callable[[Event, Stop | None], Stop | None] = _nothing


def every(num_steps: int) -> Callable[[int], bool]:
    """Return a due function, true at num_steps, 2 num_steps, ...; raises ValueError below 1."""
    if num_steps < 1:
        raise ValueError(f"every = {num_steps} should be at least 1 step")
    return lambda step: step % num_steps == 0


def train(
    state: PyTree,
    train_step: Callable[[PyTree, Any], tuple[PyTree, PyTree]],
    batches: Iterable[Any],
    hooks: Sequence[Hook],
    *,
    num_steps: int,
    rescue: Callable[[PyTree], None] | None = None,
) -> tuple[PyTree, Stop | None]:
    """Train from state.step up to num_steps, or until a hook says stop -> (state, Stop or None).

    `batches` starts at batch number state.step, which makes step state.step + 1. `train_step` may
    donate the state; it puts the batch on the devices explicitly, since implicit transfers raise in
    here. Hooks act in their order; after a Stop the hooks behind it do not act on that step, but
    all of them end. With no step to do, no hook is called.

    An exception first goes to rescue(state), which saves what there is, and is then raised again.
    Raises ValueError when the state is already past num_steps or the batches end too early.
    """
    first = int(jax.device_get(state.step))
    if first > num_steps:
        raise ValueError(f"num_steps = {num_steps}, but the state has already done {first} steps")
    source, in_flight = iter(batches), collections.deque()
    event, stop = None, None
    try:
        with jax.transfer_guard("disallow"):
            for step in range(first + 1, num_steps + 1):
                started = time.perf_counter()
                batch = _next(source, step, num_steps)
                data_wait = time.perf_counter() - started
                state, metrics = train_step(state, batch)
                in_flight.append(metrics)
                if len(in_flight) > MAX_IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                event = Event(step, state, metrics, batch, data_wait)
                stop = _act(hooks, event)
                if stop is not None:
                    break
            if event is not None:
                for hook in hooks:
                    stop = hook.end(event, stop) or stop
    except Exception as error:
        if rescue is not None:
            _rescue(rescue, state, error)
        raise
    return state, stop


def _next(source, step: int, num_steps: int) -> Any:
    try:
        return next(source)
    except StopIteration:
        raise ValueError(f"the batches ended before step {step} of {num_steps}") from None


def _act(hooks: Sequence[Hook], event: Event) -> Stop | None:
    for hook in hooks:
        if hook.due(event.step):
            stop = hook.act(event)
            if stop is not None:
                return stop
    return None


def _rescue(rescue: Callable[[PyTree], None], state: PyTree, error: Exception) -> None:
    # A failed rescue must not hide the error that made it necessary.
    try:
        rescue(state)
    except Exception as second:
        error.add_note(f"The emergency checkpoint failed too: {second}")
        raise error from second
