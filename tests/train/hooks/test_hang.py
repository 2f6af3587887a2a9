import re
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.train.hooks.hang import watch_hangs
from diffusion_jax.train.loop import train


class State(NamedTuple):
    step: jax.Array


_step = jax.jit(lambda state: (State(state.step + 1), {"loss": state.step * 1.0}))


def run(sleeps, seconds, num_steps=4):
    """Train; step n sleeps sleeps[n] seconds before it is dispatched."""

    def step(state, batch):
        time.sleep(sleeps.get(batch + 1, 0.0))
        return _step(state)

    with watch_hangs(seconds=seconds) as hook:
        train(State(jnp.int32(0)), step, iter(range(9)), [hook], num_steps=num_steps)
        time.sleep(sleeps.get("end", 0.0))


def test_a_step_that_hangs_is_told_once_with_all_stacks(capfd):
    run({3: 1.3}, seconds=0.5)
    text = capfd.readouterr().err
    (found,) = re.findall(r"no step was done for (\d+) s after step (\d+); all threads:", text)
    assert found[1] == "2"
    assert "most recent call first" in text and "in step" in text and "in train" in text


def test_each_hang_is_told(capfd):
    run({2: 1.2, 4: 1.2}, seconds=0.5)
    assert re.findall(r"after step (\d+)", capfd.readouterr().err) == ["1", "3"]


def test_the_end_may_hang_too(capfd):
    run({"end": 1.2}, seconds=0.5)
    assert re.findall(r"after step (\d+)", capfd.readouterr().err) == ["4"]


def test_compilation_and_steps_that_go_on_are_no_hang(capfd):
    run({1: 2.5, 2: 0.3, 3: 0.3, 4: 0.3}, seconds=2.0)
    assert capfd.readouterr().err == ""


def test_the_watch_ends_with_the_block():
    with pytest.raises(RuntimeError), watch_hangs():
        assert "watch_hangs" in {thread.name for thread in threading.enumerate()}
        raise RuntimeError
    assert "watch_hangs" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_bad_options(seconds):
    with pytest.raises(ValueError, match="seconds = .* above 0"), watch_hangs(seconds=seconds):
        pass
