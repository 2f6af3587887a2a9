from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.checkpoints.saving import load_metadata, open_checkpoints, restore_state
from diffusion_jax.train.hooks import checkpoint as module
from diffusion_jax.train.hooks.checkpoint import checkpoint, make_rescue
from diffusion_jax.train.hooks.validation import scores_from, validation
from diffusion_jax.train.loop import Event, Hook, Stop, train
from diffusion_jax.train.writers import Writer


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


def run(hooks, num_steps, step=lambda state, batch: _step(state), **options):
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


def test_the_stall_of_a_save_is_measured_from_the_end_of_its_step(
    tmp_path, monkeypatch, memory_writer
):
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    class Running:  # the step takes 5 more seconds
        def __array__(self, *args, **kwargs):
            clock[0] += 5.0
            return np.float32(1)

    checkpoints = open_checkpoints(tmp_path)

    def save(*args):
        clock[0] += 0.25
        return checkpoints.save(*args)

    writer, written = memory_writer()
    hook = checkpoint(checkpoints._replace(save=save), {}, every=2, writer=writer)
    for step in (1, 2):
        hook.act(Event(step, fresh(), {"loss": Running()}, None, 0.0))
    hook.end(Event(2, fresh(), {"loss": Running()}, None, 0.0), None)  # nothing waits for this one
    checkpoints.close()
    assert written.scalars == {2: {"perf/checkpoint_stall": 0.25}}


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
        validation(evaluate, Writer(), scores, every=2),
        checkpoint(checkpoints, {}, every=100, scores=scores),
    ]
    run(hooks, 12)
    checkpoints.close()
    assert checkpoints.all_steps() == [4, 8, 12]
    assert scores_from(load_metadata(tmp_path)) == {n: {"val": v} for n, v in losses.items()}
    assert scores_from(load_metadata(tmp_path, step=4)) == {2: {"val": 5.0}, 4: {"val": 3.0}}


@pytest.mark.parametrize("bad", [4, 5, 6])
@pytest.mark.parametrize("every", [2, 99])
def test_a_metric_that_is_not_finite_is_never_saved(tmp_path, bad, every):
    """At a regular save, between two, and at the last step: what was good before stays."""
    checkpoints = open_checkpoints(tmp_path, keep_last=1)

    def step(state, batch):
        n = int(state.step) + 1
        state, metrics = _step(state)
        return state, metrics | {"grad_norm": np.float32("inf" if n >= bad else 1)}

    state, stop = run([checkpoint(checkpoints, {}, every=every)], 6, step)
    seen = bad + bad % 2 if every == 2 else 6
    assert (int(state.step), stop.save) == (seen, False)
    assert stop.reason.startswith(f"grad_norm is inf at step {seen}; ")
    assert checkpoints.all_steps() == ([seen - 2] if every == 2 else [])
    checkpoints.close()


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    """The metrics of a step are those of the parameters before it."""
    checkpoints = open_checkpoints(tmp_path, keep_last=1)

    def step(state, batch):
        state, metrics = _step(state)
        if int(state.step) == 4:
            with jax.transfer_guard("allow"):
                state.params["w"] = state.params["w"].at[3].set(jnp.nan)
        return state, metrics

    _, stop = run([checkpoint(checkpoints, {}, every=2)], 6, step)
    assert stop.reason == (
        f"params/w is not finite at step 4; the last checkpoint from before is {tmp_path / '2'}"
    )
    assert checkpoints.all_steps() == [2]
    checkpoints.close()


def test_a_best_step_and_a_save_on_demand_are_looked_at_too(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep_best=1, monitor="val")
    hook = checkpoint(checkpoints, {}, every=100, scores={3: {"val": 1.0}})
    event = Event(3, fresh(), {"loss": jnp.float32(jnp.nan)}, None, 0.0)
    for stop in (hook.act(event), hook.end(event, None), hook.end(event, Stop("SIGTERM"))):
        assert stop == Stop("loss is nan at step 3; there is no checkpoint from before", save=False)
    assert hook.end(event, Stop("x", save=False)) is None
    assert checkpoints.all_steps() == []
    checkpoints.close()


@pytest.mark.parametrize("every, kept", [(3, [3]), (4, [])])
def test_a_monitor_that_is_never_reported_is_told_at_the_first_validation(tmp_path, every, kept):
    scores = {}
    checkpoints = open_checkpoints(tmp_path, keep_best=1, monitor="val/lossy")
    hooks = [
        validation(lambda state: {"val/loss": 1.0}, Writer(), scores, every=4),
        checkpoint(checkpoints, {}, every=every, scores=scores),
    ]
    with pytest.raises(ValueError, match="watches 'val/lossy'.* it reports val/loss$"):
        run(hooks, 9)
    assert checkpoints.all_steps() == kept
    with pytest.raises(ValueError, match="watches 'val/lossy'"):
        run(hooks, 9, rescue=make_rescue(checkpoints, {}, scores))
    assert checkpoints.all_steps()[-1] == 4
    checkpoints.close()


def test_a_monitor_that_is_missing_at_the_end_costs_no_checkpoint(tmp_path):
    scores = {}
    checkpoints = open_checkpoints(tmp_path, keep_best=1, monitor="val/lossy")
    hooks = [
        validation(lambda state: {"val/loss": 1.0}, Writer(), scores, every=99),
        checkpoint(checkpoints, {}, every=99, scores=scores),
    ]
    with pytest.raises(ValueError, match="watches 'val/lossy'"):
        run(hooks, 3)
    assert checkpoints.all_steps() == [3]
    checkpoints.close()


def test_a_step_saved_before_its_validation_may_still_be_the_best(tmp_path):
    """By a signal in front of validation, or at the last step, which is validated in `end`."""
    scores = {}
    checkpoints = open_checkpoints(tmp_path, keep_last=1, keep_best=1, monitor="val")
    losses = {2: 5.0, 4: 3.0, 6: 4.0, 8: 6.0, 9: 1.0}
    saver = checkpoint(checkpoints, {}, every=3, scores=scores)
    hooks = [
        Hook(lambda step: step == 4, lambda event: saver.end(event, None)),
        validation(lambda state: {"val": losses[int(state.step)]}, Writer(), scores, every=2),
        saver,
    ]
    run(hooks, 8)
    assert checkpoints.all_steps() == [4, 8]
    last = open_checkpoints(tmp_path / "last", keep_last=1, keep_best=1, monitor="val")
    scores.clear()
    hooks[0] = Hook(lambda step: False, lambda event: None)
    hooks[2] = checkpoint(last, {}, every=3, scores=scores)
    run(hooks, 9)
    assert not last.is_best({"val": 2.0})
    for opened in (checkpoints, last):
        opened.close()


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


def test_rescue_refuses_parameters_that_are_not_finite(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    state = State(jnp.int32(3), {"v": jnp.ones(2), "w": jnp.array([1.0, jnp.inf])})
    with pytest.raises(RuntimeError, match="params/w is not finite at step 3; there is no check"):
        make_rescue(checkpoints, {})(state)
    assert checkpoints.all_steps() == []
    checkpoints.close()


def test_rescue_does_not_save_what_training_started_from(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    rescue = make_rescue(checkpoints, {}, first_step=0)
    rescue(fresh())
    assert checkpoints.all_steps() == []
    rescue(_step(fresh())[0])
    assert checkpoints.all_steps() == [1]
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
