import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.hooks.validation import scores_from, validation
from diffusion_jax.train.loop import Hook, Stop, train
from diffusion_jax.train.writers import Writer


class State(NamedTuple):
    step: jax.Array


_step = jax.jit(lambda state: (State(state.step + 1), {"loss": state.step * 1.0}))


def run(hooks, num_steps):
    state = State(jnp.int32(0))
    return train(state, lambda s, b: _step(s), iter(int, 1), hooks, num_steps=num_steps)


def evaluate(state):
    # careless on purpose: implicit transfers are allowed here
    return {"val/loss": state.step * np.float32(1.0) + 0.5}


def test_scores_are_shared_and_written(memory_writer):
    (writer, written), scores = memory_writer(), {}
    run([validation(evaluate, writer, scores, every=4)], 10)
    assert scores == written.scalars
    assert scores == {n: {"val/loss": n + 0.5} for n in (4, 8, 10)}


def test_the_last_step_is_validated_once():
    calls, scores = [], {}
    hook = validation(lambda s: calls.append(1) or {"v": 1.0}, Writer(), scores, every=4)
    run([hook], 8)
    assert (len(calls), list(scores)) == (2, [4, 8])


def test_nobody_waits_for_it_after_a_stop():
    scores = {}
    stopper = Hook(lambda step: step == 5, lambda event: Stop("SIGTERM"))
    run([stopper, validation(evaluate, Writer(), scores, every=4)], 10)
    assert list(scores) == [4]


def test_scores_survive_json():
    scores = {10: {"val": 0.5}, 200: {"val": 0.25}}
    stored = json.loads(json.dumps({"scores": {str(k): v for k, v in scores.items()}}))
    assert scores_from(stored) == scores


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every = 0"):
        validation(evaluate, Writer(), {}, every=0)
