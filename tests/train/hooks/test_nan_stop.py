from typing import NamedTuple

import numpy as np
import pytest

from diffusion_jax.train.checkpoints.saving import open_checkpoints
from diffusion_jax.train.hooks.checkpoint import checkpoint
from diffusion_jax.train.hooks.nan_stop import nan_stop
from diffusion_jax.train.loop import train


class State(NamedTuple):
    step: np.ndarray
    params: dict


def step_with(values, name="loss"):
    def step(state, batch):
        n = int(state.step) + 1
        metrics = {"loss": np.float32(1), "grad_norm": np.float32(1)}
        metrics[name] = np.float32(values.get(n, 1.0))
        return State(np.int32(n), state.params), metrics

    return step


def run(step, hooks, num_steps):
    state = State(np.int32(0), {"w": np.zeros(3, np.float32)})
    return train(state, step, iter(int, 1), hooks, num_steps=num_steps)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_names_the_first_step_and_metric(value):
    step = step_with({7: float(value), 8: float("nan")}, "grad_norm")
    state, stop = run(step, [nan_stop(every=5)], 100)
    assert stop.reason == f"grad_norm is {value} at step 7"
    assert stop.save is False
    assert state.step == 11


def test_finite_metrics_pass():
    assert run(step_with({}), [nan_stop(every=5)], 12)[1] is None


def test_it_looks_at_the_last_steps_too():
    _, stop = run(step_with({12: float("nan")}), [nan_stop(every=5)], 12)
    assert stop.reason == "loss is nan at step 12"


def test_names_the_last_checkpoint_from_before_and_saves_no_more(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep_last=5)
    hooks = [nan_stop(every=5, checkpoints=checkpoints), checkpoint(checkpoints, {}, every=3)]
    _, stop = run(step_with({8: float("nan")}), hooks, 100)
    assert stop.reason.endswith(f"the last checkpoint from before is {tmp_path / '6'}")
    assert checkpoints.all_steps() == [3, 6, 9]
    checkpoints.close()


def test_a_bad_last_step_is_not_saved(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    hooks = [nan_stop(every=5, checkpoints=checkpoints), checkpoint(checkpoints, {}, every=50)]
    _, stop = run(step_with({7: float("nan")}), hooks, 7)
    assert "there is no checkpoint from before" in stop.reason
    assert checkpoints.all_steps() == []
    checkpoints.close()
