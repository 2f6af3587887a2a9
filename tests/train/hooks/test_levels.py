"""The hook of losses by noise level: files get scalars, the terminal gets lines."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.train.hooks.levels import levels
from diffusion_jax.train.loop import Hook, Stop, train


class State(NamedTuple):
    step: jax.Array


_step = jax.jit(lambda state: (State(state.step + 1), {"loss": state.step * 1.0}))


def run(hooks, num_steps):
    return train(
        State(jnp.int32(0)), lambda s, b: _step(s), iter(int, 1), hooks, num_steps=num_steps
    )


def evaluate(state):
    return {"levels/00": float(state.step)}


def test_scalars_are_written_and_lines_are_said(memory_writer, caplog):
    writer, written = memory_writer()
    hook = levels(evaluate, lambda found: [f"a {found['levels/00']}", "b"], writer, every=2)
    with caplog.at_level(logging.INFO, "diffusion_jax"):
        run([hook], 5)
    assert written.scalars == {n: {"levels/00": n} for n in (2, 4, 5)}
    assert caplog.records[0].message == "step 2, loss by noise level:\n  a 2.0\n  b"
    assert len(caplog.records) == 3


def test_nobody_waits_for_it_after_a_stop(memory_writer):
    writer, written = memory_writer()
    stopper = Hook(lambda step: step == 3, lambda event: Stop("SIGTERM"))
    run([stopper, levels(evaluate, lambda found: [], writer, every=2)], 9)
    assert list(written.scalars) == [2]
