import time

import jax
import numpy as np
import pytest

from diffusion_jax.train.hooks.late import late
from diffusion_jax.train.loop import Event, Hook, Stop, train


class Fake:
    def __init__(self, step, log):
        self.step, self.log = step, log

    def block_until_ready(self):
        return self

    def __array__(self, *args, **kwargs):
        self.log.append(("read", self.step))
        return np.float32(self.step)


class State:
    def __init__(self, step):
        self.step = step


def run(hooks, num_steps, log=None, pause=0.0):
    log = [] if log is None else log

    def step(state, batch):
        time.sleep(pause)
        log.append(("dispatch", state.step + 1))
        return State(state.step + 1), {"loss": Fake(state.step + 1, log)}

    return train(State(0), step, iter(int, 1), hooks, num_steps=num_steps)


def test_every_metric_arrives_once_and_late():
    log, got = [], []
    run([late(lambda interval: got.append(interval), every=3)], 8, log)
    assert [interval.steps for interval in got] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert [[m["loss"] for m in interval.metrics] for interval in got] == [
        [1, 2, 3],
        [4, 5, 6],
        [7, 8],
    ]
    for step in range(1, 8):
        assert log.count(("read", step)) == 1
        assert log.index(("read", step)) > log.index(("dispatch", step + 1))


def test_an_interval_that_ends_with_the_last_step():
    got = []
    run([late(lambda interval: got.append(interval.steps), every=4)], 8)
    assert got == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_stop_before_it_loses_nothing():
    got = []
    stopper = Hook(lambda step: step == 5, lambda event: Stop("x"))
    run([stopper, late(lambda interval: got.append(interval.steps), every=3)], 9)
    assert got == [[1, 2, 3], [4, 5]]


def test_its_stop_ends_the_training():
    hook = late(lambda interval: Stop("enough") if 3 in interval.steps else None, every=3)
    state, stop = run([hook], 9)
    assert (state.step, stop) == (4, Stop("enough"))


def test_its_stop_at_the_end_counts():
    hook = late(lambda interval: Stop("enough") if 5 in interval.steps else None, every=3)
    _, stop = run([hook], 5)
    assert stop == Stop("enough")


def test_time_is_measured_without_the_first_step():
    got = []
    run([late(got.append, every=4)], 8, pause=0.02)
    assert [interval.timed_steps for interval in got] == [3, 4]
    assert all(0.05 < interval.seconds < 0.5 for interval in got)


def test_a_single_step_is_not_timed():
    got = []
    run([late(got.append, every=4)], 1)
    assert [(interval.steps, interval.timed_steps) for interval in got] == [([1], 0)]


def test_waiting_for_data_adds_up():
    got = []
    hook = late(got.append, every=2)
    for step in range(1, 6):
        hook.act(Event(step, None, {"loss": np.float32(0)}, None, float(step)))
    hook.end(Event(5, None, {"loss": np.float32(0)}, None, 5.0), None)
    assert [interval.data_wait for interval in got] == [2.0, 7.0, 5.0]


def test_gaps_between_steps_once_the_host_follows_the_device():
    got = []
    run([late(got.append, every=5)], 10, pause=0.02)
    # Steps 1 to 3 are dispatched before the loop waits for one.
    assert [len(interval.gaps) for interval in got] == [2, 5]
    assert all(gap >= 0.02 for interval in got for gap in interval.gaps)


def test_attached_values_belong_to_the_last_step():
    got, log = [], []

    def attach(step):
        log.append(("dispatch", step))
        return Fake(100 + step, [])

    run([late(lambda i: got.append(float(i.attached)), every=3, attach=attach)], 7)
    assert got == [103, 106, 107]
    assert log == [("dispatch", 3), ("dispatch", 6), ("dispatch", 7)]


def test_nothing_of_the_state_or_the_batch_is_kept():
    import weakref

    class Big:
        pass

    hook, big = late(lambda interval: None, every=10), Big()
    kept = weakref.ref(big)
    hook.act(Event(1, big, {"loss": jax.numpy.float32(0)}, big, 0.0))
    del big
    assert kept() is None


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every = 0"):
        late(lambda interval: None, every=0)
