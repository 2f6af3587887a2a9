import errno
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.hooks.received import Interrupted
from diffusion_jax.train.loop import MAX_IN_FLIGHT, Event, Hook, Stop, every, train


class State(NamedTuple):
    step: jax.Array
    params: jax.Array


def fresh(step=0):
    return State(jnp.int32(step), jnp.zeros(4))


@jax.jit
def _update(state, batch):
    params = state.params + batch.mean()
    return State(state.step + 1, params), {"loss": params.sum()}


def toy_step(state, batch):
    return _update(state, jax.device_put(batch))


def batches(start=0):
    n = start
    while True:
        yield np.full(2, n, np.float32)
        n += 1


def always(step):
    return True


class Fake:
    """A device scalar that notes when it is waited for and when it is read."""

    def __init__(self, step, log):
        self.step, self.log = step, log

    def block_until_ready(self):
        self.log.append(("wait", self.step))
        return self

    def __array__(self, *args, **kwargs):
        self.log.append(("read", self.step))
        return np.float32(self.step)


def test_every_step_runs_once_in_order_and_hooks_see_it():
    seen = []
    hook = Hook(always, lambda event: seen.append(event))
    state, stop = train(fresh(), toy_step, batches(), [hook], num_steps=5)
    assert stop is None
    assert int(state.step) == 5
    np.testing.assert_allclose(state.params, np.full(4, 0 + 1 + 2 + 3 + 4))
    assert [event.step for event in seen] == [1, 2, 3, 4, 5]
    assert [int(event.state.step) for event in seen] == [1, 2, 3, 4, 5]
    assert [event.batch[0] for event in seen] == [0, 1, 2, 3, 4]
    assert [float(event.metrics["loss"]) for event in seen] == [0, 4, 12, 24, 40]


def test_continues_at_the_step_of_the_state():
    seen = []
    hook = Hook(always, lambda event: seen.append(event.step))
    state, _ = train(fresh(3), toy_step, batches(3), [hook], num_steps=5)
    assert seen == [4, 5]
    np.testing.assert_allclose(state.params, np.full(4, 3 + 4))


def test_due_decides_and_end_follows_once_with_the_last_event():
    log = []
    hook = Hook(
        every(2),
        lambda event: log.append(("act", event.step)),
        lambda event, stop: log.append(("end", event.step, stop)),
    )
    train(fresh(), toy_step, batches(), [hook], num_steps=5)
    assert log == [("act", 2), ("act", 4), ("end", 5, None)]


def test_stop_ends_the_loop_and_later_hooks_end_without_acting():
    log = []

    def note(name):
        return Hook(
            always,
            lambda event: log.append((name, event.step)),
            lambda event, stop: log.append((name, "end", event.step, stop.reason)),
        )

    stopper = Hook(every(2), lambda event: Stop("enough"))
    state, stop = train(fresh(), toy_step, batches(), [note("a"), stopper, note("b")], num_steps=9)
    assert stop == Stop("enough", save=True)
    assert int(state.step) == 2
    assert log == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("a", "end", 2, "enough"),
        ("b", "end", 2, "enough"),
    ]


def test_a_stop_found_at_the_end_reaches_the_hooks_behind_it():
    seen = []
    finder = Hook(lambda step: False, always, lambda event, stop: Stop("nan", save=False))
    saver = Hook(lambda step: False, always, lambda event, stop: seen.append(stop))
    _, stop = train(fresh(), toy_step, batches(), [finder, saver], num_steps=2)
    assert seen == [stop] == [Stop("nan", save=False)]


def test_no_step_to_do_calls_no_hook():
    hook = Hook(always, lambda event: 1 / 0, lambda event, stop: 1 / 0)
    state, stop = train(fresh(5), toy_step, batches(), [hook], num_steps=5)
    assert (int(state.step), stop) == (5, None)


def test_state_past_the_end_is_an_error():
    with pytest.raises(ValueError, match="num_steps = 4 should be at least 5, the steps done"):
        train(fresh(5), toy_step, batches(), [], num_steps=4)


def test_batches_that_end_are_an_error():
    with pytest.raises(ValueError, match="ended before step 3 of 4"):
        train(fresh(), toy_step, list(batches_of(2)), [], num_steps=4)


def batches_of(n):
    source = batches()
    return [next(source) for _ in range(n)]


def test_batches_that_cannot_be_read_are_one_sentence():
    def broken():
        yield from batches_of(2)
        raise OSError(errno.ESTALE, "Stale file handle", "images/1.png")

    message = r"cannot read the batch of step 3: .*Stale file handle: 'images/1.png'"
    with pytest.raises(OSError, match=message):
        train(fresh(), toy_step, broken(), [], num_steps=4)


def test_every_rejects_zero():
    with pytest.raises(ValueError, match="every = 0"):
        every(0)


def test_metrics_of_a_step_are_read_after_the_next_one_was_dispatched():
    log = []

    def fake_step(state, batch):
        step = state.step + 1
        log.append(("dispatch", step))
        return State(step, state.params), {"loss": Fake(step, log)}

    pending = []

    def read_late(event):
        if pending:
            jax.device_get(pending.pop())
        pending.append(event.metrics)

    train(State(0, None), fake_step, batches(), [Hook(always, read_late)], num_steps=6)
    for step in range(1, 6):
        read = log.index(("read", step))
        assert read > log.index(("dispatch", step + 1))
    # the loop itself waits only for steps that have MAX_IN_FLIGHT later ones behind them
    for step in range(1, 6 - MAX_IN_FLIGHT):
        assert log.index(("wait", step)) > log.index(("dispatch", step + MAX_IN_FLIGHT))
    assert ("wait", 6 - MAX_IN_FLIGHT + 1) not in log


def test_implicit_transfers_raise_in_the_loop():
    def careless(event):
        float(np.asarray(event.batch).mean() + event.state.params.sum())

    with pytest.raises(Exception, match="[Dd]isallowed"):
        train(fresh(), lambda s, b: _update(s, b), batches(), [], num_steps=1)
    with pytest.raises(Exception, match="[Dd]isallowed"):
        train(fresh(), toy_step, batches(), [Hook(always, careless)], num_steps=1)


def test_time_waiting_for_data_is_measured():
    def slow():
        for batch in batches():
            time.sleep(0.05)
            yield batch

    seen: list[Event] = []
    train(fresh(), toy_step, slow(), [Hook(always, lambda e: seen.append(e))], num_steps=3)
    assert all(0.05 <= event.data_wait < 0.5 for event in seen)


def test_exception_saves_the_state_and_is_raised_again():
    def broken(event):
        if event.step == 3:
            raise RuntimeError("disk on fire")

    saved = []
    with pytest.raises(RuntimeError, match="disk on fire"):
        train(
            fresh(), toy_step, batches(), [Hook(always, broken)], num_steps=9, rescue=saved.append
        )
    assert [int(state.step) for state in saved] == [3]


def test_exception_in_the_data_saves_the_state_before_it():
    saved = []
    with pytest.raises(ValueError, match="ended"):
        train(fresh(), toy_step, batches_of(2), [], num_steps=9, rescue=saved.append)
    assert [int(state.step) for state in saved] == [2]


def test_failing_rescue_does_not_hide_the_first_error():
    def rescue(state):
        raise OSError("no space")

    with pytest.raises(ValueError, match="ended") as caught:
        train(fresh(), toy_step, [], [], num_steps=9, rescue=rescue)
    assert "the emergency checkpoint failed too: no space" in caught.value.__notes__[0]


def test_all_hooks_end_after_an_exception_whatever_one_of_them_raises():
    log = []

    def note(name, fails):
        def end(event, stop):
            log.append((name, event.step, stop.save))
            if fails:
                raise OSError(f"{name} is full")

        return Hook(every(9), lambda event: None, end)

    def rescue(state):
        log.append(("rescue", int(state.step)))
        raise OSError("no space")

    hooks = [note("a", False), note("b", True), note("c", False)]
    with pytest.raises(ValueError, match="ended before step 3") as caught:
        train(fresh(), toy_step, batches_of(2), hooks, num_steps=9, rescue=rescue)
    assert log == [("rescue", 2), ("a", 2, False), ("b", 2, False), ("c", 2, False)]
    assert [note.split(" failed")[0] for note in caught.value.__notes__] == [
        "the emergency checkpoint",
        "a hook",
    ]


def test_hooks_behind_one_that_fails_act_before_the_state_is_saved(monkeypatch):
    """A run that goes on from there does not do this step again: its validation would be lost."""
    log = []

    def note(name, step=1, error=None):
        def act(event):
            log.append((name, event.step))
            if error is not None and event.step == 2:
                raise error

        return Hook(every(step), act, lambda event, stop: log.append((f"{name} ends", event.step)))

    hooks = [note("a"), note("b", error=OSError("b is full")), note("c"), note("d", step=3)]
    with pytest.raises(OSError, match="b is full"):
        rescue = lambda state: log.append(("rescue", int(state.step)))
        train(fresh(), toy_step, batches(), hooks, num_steps=9, rescue=rescue)
    ends = [(f"{name} ends", 2) for name in "abcd"]
    assert log[3:] == [("a", 2), ("b", 2), ("c", 2), ("rescue", 2), *ends]
    log.clear()
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # the others do not know
    with pytest.raises(OSError, match="b is full"):
        train(fresh(), toy_step, batches(), hooks, num_steps=9)
    assert log[3:] == [("a", 2), ("b", 2), *ends]


def test_no_hook_ends_twice():
    ended = []

    def end(event, stop):
        ended.append(stop)
        if len(ended) == 1:
            raise OSError("full")

    hooks = [Hook(always, lambda event: None, end), Hook(always, lambda event: None, end)]
    with pytest.raises(OSError, match="full"):
        train(fresh(), toy_step, batches(), hooks, num_steps=2)
    assert ended == [None, Stop("OSError: full", save=False)]


def test_a_stop_before_the_first_step_leaves_everything_as_it_is():
    starts = []
    hooks = [
        Hook(always, lambda e: 1 / 0, lambda e, s: 1 / 0, lambda step: starts.append(step)),
        Hook(always, lambda e: 1 / 0, start=lambda step: Stop("stopped before")),
    ]
    state, stop = train(fresh(3), toy_step, batches(3), hooks, num_steps=9)
    assert (int(state.step), stop, starts) == (3, Stop("stopped before"), [3])
    hooks = [Hook(always, lambda e: None, start=lambda step: Stop("stopped before"))]
    assert train(fresh(9), toy_step, batches(9), hooks, num_steps=9)[1] is None


def test_keyboard_interrupt_aborts_without_rescue():
    def interrupt(event):
        raise KeyboardInterrupt

    saved = []
    with pytest.raises(KeyboardInterrupt):
        train(
            fresh(),
            toy_step,
            batches(),
            [Hook(always, interrupt)],
            num_steps=2,
            rescue=saved.append,
        )
    assert not saved


def test_a_signal_in_the_wait_for_a_batch_is_a_stop_once_there_is_a_step():
    def until(step):
        yield from itertools.islice(batches(), step)
        raise Interrupted("SIGTERM")

    ends = []
    hook = Hook(
        lambda step: False, lambda event: None, lambda event, stop: ends.append((event.step, stop))
    )
    state, stop = train(fresh(), toy_step, until(3), [hook], num_steps=5)
    assert (int(state.step), stop) == (3, Stop("SIGTERM"))
    assert ends == [(3, Stop("SIGTERM"))]
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(fresh(), toy_step, until(0), [hook], num_steps=5)
    assert len(ends) == 1


def test_loop_is_short():
    import inspect

    body = inspect.getsource(train).split('"""')[2]
    assert len(body.splitlines()) <= 40
