from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.checkpoint import load_metadata, open_checkpoints, restore_state
from diffusion_jax.train.hooks.checkpoint import checkpoint, make_rescue
from diffusion_jax.train.hooks.validation import scores_from, validation
from diffusion_jax.train.loop import Hook, Stop, train
from diffusion_jax.train.writers import memory_writer


class State(NamedTuple):
    step: jax.Array
    params: dict


def _update(state):
    params = {"w": state.params["w"] + 1}
    return State(state.step + 1, params), {"loss": params["w"].sum()}


_step = jax.jit(_update, donate_argnums=0)


def fresh():
    return State(jnp.int32(0), {"w": jnp.zeros(8)})


def abstract():
    state = fresh()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def run(hooks, num_steps, **options):
    step = lambda state, batch: _step(state)
    return train(fresh(), step, iter(int, 1), hooks, num_steps=num_steps, **options)


def test_saves_every_so_often_and_at_the_end_with_the_data_position(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep_last=9)
    run([checkpoint(checkpoints, {"seed": 5}, every=4)], 10)
    assert checkpoints.all_steps() == [4, 8, 10]
    for n in (4, 8, 10):  # donated or not: every save holds its own step
        state, metadata = checkpoints.restore(abstract(), n)
        assert int(state.step) == n
        np.testing.assert_array_equal(state.params["w"], np.full(8, n))
        assert metadata == {"seed": 5, "next_batch": n, "scores": {}}
    checkpoints.close()


@pytest.mark.parametrize("save, kept", [(True, [4, 6]), (False, [4])])
def test_a_stop_says_whether_its_state_is_saved(tmp_path, save, kept):
    checkpoints = open_checkpoints(tmp_path, keep_last=9)
    stopper = Hook(lambda step: step == 6, lambda event: Stop("x", save=save))
    run([stopper, checkpoint(checkpoints, {}, every=4)], 10)
    checkpoints.close()
    assert checkpoints.all_steps() == kept


def test_best_validations_are_saved_between_the_regular_ones(tmp_path):
    losses = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: 9.0, 12: 8.0}
    scores = {}
    checkpoints = open_checkpoints(tmp_path, keep_last=1, keep_best=2, monitor="val")
    evaluate = lambda state: {"val": losses[int(state.step)]}
    hooks = [
        validation(evaluate, memory_writer()[0], scores, every=2),
        checkpoint(checkpoints, {}, every=100, scores=scores),
    ]
    run(hooks, 12)
    checkpoints.close()
    assert checkpoints.all_steps() == [4, 8, 12]
    assert scores_from(load_metadata(tmp_path)) == {n: {"val": v} for n, v in losses.items()}
    assert scores_from(load_metadata(tmp_path, step=4)) == {2: {"val": 5.0}, 4: {"val": 3.0}}


def test_rescue_saves_the_state_of_a_failed_run(tmp_path):
    checkpoints = open_checkpoints(tmp_path)

    def fail(event):
        if event.step == 3:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run([Hook(lambda s: True, fail)], 9, rescue=make_rescue(checkpoints, {"seed": 1}))
    state, metadata = restore_state(tmp_path, abstract())
    assert (int(state.step), metadata["next_batch"]) == (3, 3)
    checkpoints.close()


def test_rescue_says_when_the_state_is_gone(tmp_path):
    checkpoints = open_checkpoints(tmp_path)

    def step(state, batch):
        _step(state)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as error:
        train(fresh(), step, iter(int, 1), [], num_steps=9, rescue=make_rescue(checkpoints, {}))
    assert "given away to the step that failed" in error.value.__notes__[0]
    assert checkpoints.all_steps() == []
    checkpoints.close()


def test_rescue_leaves_shared_states_alone(tmp_path, monkeypatch):
    checkpoints = open_checkpoints(tmp_path)
    rescue = make_rescue(checkpoints, {})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match="all of them share"):
        rescue(fresh())
    monkeypatch.undo()
    checkpoints.close()


def test_every_must_be_positive(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="every = 0"):
        checkpoint(checkpoints, {}, every=0)
    checkpoints.close()
