"""The metrics hook: when it acts, where scores go, and what it says of its cost."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.train.hooks.early_stopping import early_stopping
from diffusion_jax.train.hooks.metrics import metrics
from diffusion_jax.train.hooks.validation import validation
from diffusion_jax.train.loop import Hook, Stop, train
from diffusion_jax.train.writers import Writer


class State(NamedTuple):
    step: jax.Array


_step = jax.jit(lambda state: (State(state.step + 1), {"loss": state.step * 1.0}))


class Clock:
    """A clock that tests turn: each step takes `step` seconds, each score `score`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(every, num_steps, *, step=1.0, score=0.1, first=0.1, more=(), writer=None):
    clock, scores, calls = Clock(), {}, []

    def of(state):
        clock.now += score if calls else first
        calls.append(int(state.step))
        return {"mind": calls[-1] * 0.5}

    def one(state, batch):
        clock.now += step
        return _step(state)

    hook = metrics(of, writer or Writer(), scores, every=every, clock=clock)
    hooks = [hook, *(make(scores) for make in more)]
    _, stop = train(State(jnp.int32(0)), one, iter(int, 1), hooks, num_steps=num_steps)
    return scores, calls, stop


def test_scores_go_to_the_writer_and_to_those_who_watch(memory_writer):
    writer, written = memory_writer()
    scores, calls, _ = run(4, 10, writer=writer)
    assert calls == [4, 8, 10]
    assert scores == written.scalars
    assert scores[8]["metrics/mind"] == 4.0
    assert scores[10]["metrics/time_share"] == pytest.approx(0.3 / 10.3)


def test_nobody_waits_for_it_after_a_stop():
    stopper = lambda scores: Hook(lambda step: step == 5, lambda event: Stop("SIGTERM"))  # noqa: E731
    assert run(4, 10, more=[stopper])[1] == [4]


@pytest.mark.parametrize(("score", "said"), [(0.2, False), (2.0, True)])
def test_more_than_five_percent_is_said_once_with_a_way_out(caplog, score, said):
    with caplog.at_level(logging.WARNING):
        run(10, 50, score=score, first=100.0)  # the first one compiles and does not count
    told = [record.message for record in caplog.records]
    # 2 s for each 10 s are 17 %; 38 steps for each 2 s are 5 %.
    expected = ["metrics take 17 % of the time; config.hooks.metrics.every = 38 would make it 5 %"]
    assert told == (expected if said else [])


def test_a_monitor_waits_for_the_kind_of_scores_that_it_watches():
    """Validation at other steps says nothing of a metric, and the other way round."""
    watch = lambda name: lambda scores: early_stopping(scores, monitor=name, patience=2)  # noqa: E731
    val = lambda scores: validation(lambda s: {"val/loss": 1.0}, Writer(), scores, every=1)  # noqa: E731
    scores, calls, stop = run(4, 40, more=[val, watch("metrics/mind")])
    assert (
        calls == [4, 8, 12] and stop is not None and "metrics/mind did not improve" in stop.reason
    )
    assert set(scores[4]) == {"metrics/mind", "metrics/time_share", "val/loss"}
    assert run(4, 40, more=[val, watch("val/loss")])[1] == []
    with pytest.raises(ValueError, match="'metrics/mnd', which validation does not report"):
        run(4, 40, more=[val, watch("metrics/mnd")])


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every = 0"):
        metrics(lambda state: {}, Writer(), {}, every=0)
