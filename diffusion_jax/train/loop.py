"""The training loop: state, metrics = train_step(state, batch), and hooks in between.

Synopsis:

    hooks = [nan_stop(...), scalars(...), images(...), checkpoint(...)]
    state, stop = train(state, train_step, batches, hooks, num_steps=10_000)

Exact resume and a busy device depend on the order of one step:

1. the host waits for batch n (timed: Event.data_wait);
2. step n is dispatched; the device works on it while the host goes on;
3. the host waits until step n - MAX_IN_FLIGHT is done, so that the device always has work queued
   and the host cannot run away from it;
4. every hook that is due at n acts on state n, before step n+1 takes (donates) its buffers.

Event.metrics are device arrays of a step that is still running. A hook keeps them and reads them
when it is called for step n+1, after that step was dispatched (hooks/late.py does this for all who
need it). What it still holds when the loop ends, it reads in `end`. So no metric is lost, and none
is waited for.
"""

import collections
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.train.hooks.received import Interrupted
from diffusion_jax.types import PyTree

MAX_IN_FLIGHT = 2


class Event(NamedTuple):
    """What a hook sees after a step was dispatched.

    step: optimizer steps completed, 1 after the first. state: the state after that step, valid
    until the hook returns, because the next step donates it. metrics: scalars of that step on the
    device; reading them waits for the step, so only a hook that waits for the state anyway
    (checkpoint) does so before the next step is dispatched. batch: the batch of that step as the
    iterator gave it (host arrays). data_wait: seconds the host waited for that batch.
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


def _nothing(*args: Any) -> None:
    del args


class Hook(NamedTuple):
    """A pair of functions that watches the training, and two for hooks that need more.

    due(step): whether to act; pure, so that all hosts agree when they act together.
    act(event): None to go on, or a Stop.
    end(event, stop): called once after the last step, with the event of that step and the Stop or
        None; a Stop that it returns replaces the one before. After an exception, too, with a Stop
        whose `save` is False.
    start(step): called once before the first step, with the number of steps done; a Stop means that
        there is nothing to train.
    """

    due: Callable[[int], bool]
    act: Callable[[Event], Stop | None]
    end: Callable[[Event, Stop | None], Stop | None] = _nothing
    start: Callable[[int], Stop | None] = _nothing


def check_every(num_steps: int, name: str = "every") -> None:
    """Raise ValueError unless a number of steps, an option of this name, is at least 1."""
    if num_steps < 1:
        raise ValueError(f"{name} = {num_steps} should be at least 1 step")


def every(num_steps: int) -> Callable[[int], bool]:
    """Make a due function, true at num_steps, 2 num_steps, ...; raises ValueError below 1."""
    check_every(num_steps)
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
    all of them end. With no step to do, no hook is called. When the wait for a batch raises
    Interrupted, that is a Stop too, unless no step was done yet.

    After an exception the hooks behind the one that raised it act, rescue(state) saves what there
    is, all hooks end, and it is raised again.
    Raises ValueError when the state is already past num_steps or the batches end too early, and
    OSError when they cannot be read.
    """
    first = int(jax.device_get(state.step))
    if first > num_steps:
        raise ValueError(f"num_steps = {num_steps} should be at least {first}, the steps done")
    source, in_flight = iter(batches), collections.deque()
    acting, ending, event, stop = iter(hooks[:0]), iter(hooks), None, None
    try:
        for hook in hooks if first < num_steps else ():
            if (stop := hook.start(first)) is not None:
                return state, stop
        with jax.transfer_guard("disallow"):
            for step in range(first + 1, num_steps + 1):
                started = time.perf_counter()
                batch = _next(source, step, num_steps, first)
                data_wait = time.perf_counter() - started
                if isinstance(batch, Stop):
                    stop = batch
                    break
                state, metrics = train_step(state, batch)
                event = Event(step, state, metrics, batch, data_wait)
                in_flight.append(metrics)
                if len(in_flight) > MAX_IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                stop = _act(acting := iter(hooks), event)
                if stop is not None:
                    break
            acting = iter(hooks[:0])
            if event is not None:
                for hook in ending:
                    stop = hook.end(event, stop) or stop
    except Exception as error:
        last = Stop(f"{type(error).__name__}: {error}", save=False)
        acts = [("a hook", functools.partial(hook.end, event, last)) for hook in ending if event]
        if rescue is not None:
            acts.insert(0, ("the emergency checkpoint", functools.partial(rescue, state)))
        _do_all(error, [("a hook", act) for act in _not_done(acting, event)] + acts)
        raise
    return state, stop


def _next(source, step: int, num_steps: int, first: int) -> Any:
    """Return the next batch, or a Stop when a signal came instead and there is a step to save."""
    try:
        return next(source)
    except StopIteration:
        raise ValueError(f"the batches ended before step {step} of {num_steps}") from None
    except OSError as error:
        raise OSError(f"cannot read the batch of step {step}: {error}") from error
    except Interrupted as signal:
        if step == first + 1:
            raise
        return Stop(str(signal))


def _act(hooks: Iterable[Hook], event: Event) -> Stop | None:
    for hook in hooks:
        if hook.due(event.step):
            stop = hook.act(event)
            if stop is not None:
                return stop
    return None


def _not_done(hooks: Iterable[Hook], event: Event | None) -> list[Callable[[], Any]]:
    """List what hooks behind one that failed still have to do; the step is not done again.

    Several processes would wait for each other in it, as the others do not know of the error.
    """
    if event is None or jax.process_count() > 1:
        return []
    return [functools.partial(hook.act, event) for hook in hooks if hook.due(event.step)]


def _do_all(error: Exception, acts: Sequence[tuple[str, Callable[[], Any]]]) -> None:
    """Do each of `acts`; where one fails too, the error gets a note and is raised in the end."""
    if not acts:
        return
    what, act = acts[0]
    try:
        act()
    except Exception as second:
        error.add_note(f"{what} failed too: {second}")
        raise error from second
    finally:
        _do_all(error, acts[1:])
