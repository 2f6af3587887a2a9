from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.train.hooks import profiler as module
from diffusion_jax.train.hooks.profiler import profiler
from diffusion_jax.train.loop import train


class State(NamedTuple):
    step: jax.Array


_step = jax.jit(lambda state: (State(state.step + 1), {"loss": state.step * 1.0}))


def run(hook, num_steps, first=0):
    state = State(jnp.int32(first))
    train(state, lambda s, b: _step(s), iter(int, 1), [hook], num_steps=num_steps)


@pytest.fixture
def log(monkeypatch):
    log = []
    monkeypatch.setattr(module.jax.profiler, "start_trace", lambda path: log.append(path))
    monkeypatch.setattr(module.jax.profiler, "stop_trace", lambda: log.append("stop"))
    return log


def test_traces_the_steps_it_was_asked_for(log):
    hook = profiler("there", first_step=4, num_steps=3)
    assert [step for step in range(1, 20) if hook.due(step)] == [3, 6]
    run(hook, 10)
    assert log == ["there", "stop"]


def test_one_step(log):
    run(profiler("there", first_step=4, num_steps=1), 10)
    assert log == ["there", "stop"]


def test_training_that_ends_in_the_middle(log):
    run(profiler("there", first_step=4, num_steps=30), 10)
    assert log == ["there", "stop"]


def test_a_run_resumed_behind_it_traces_nothing(log):
    run(profiler("there", first_step=4, num_steps=3), 10, first=4)
    assert log == []


def test_a_real_trace(tmp_path):
    run(profiler(tmp_path, first_step=2, num_steps=1), 3)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_bad_options():
    with pytest.raises(ValueError, match="first_step = 1"):
        profiler("there", first_step=1)
