"""Snapshots of the longest average: few at any length of run, the same after a kill."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.train.checkpoints.reading import restore_state, saved_steps
from diffusion_jax.train.hooks import snapshots as module
from diffusion_jax.train.hooks.snapshots import snapshots
from diffusion_jax.train.loop import train
from diffusion_jax.train.power_ema import find_tracks, is_snapshot_step, pack, power_ema, unpack

SIZE = 1 << 16
TX = optax.named_chain(("sgd", optax.sgd(0.1)), ("power_ema", power_ema((0.05, 0.1))))


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: dict


@jax.jit
def _step(state):
    gradients = {"w": jnp.sin(state.step + jnp.arange(SIZE, dtype=jnp.float32))}
    updates, opt_state = TX.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, opt_state), {"loss": params["w"][0]}


def fresh():
    params = {"w": jnp.zeros(SIZE)}
    return State(jnp.int32(0), params, TX.init(params))


def run(directory, num_steps, state=None, every=1, count=3, step=_step):
    state = fresh() if state is None else state
    hook = snapshots(directory, count=count, every=every)
    return train(state, lambda s, b: step(s), iter(int, 1), [hook], num_steps=num_steps)[0]


def read(directory, step):
    like = jax.eval_shape(pack, {"w": jnp.zeros(SIZE)})
    return unpack(restore_state(directory, like, step)[0])["w"]


def held(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_the_folder_stays_below_twice_the_parameters_at_any_time(tmp_path, monkeypatch):
    most, save = [], module.open_checkpoints

    def watched(directory, **options):
        most.append(held(tmp_path))  # before one is written, which adds two bytes a parameter
        return save(directory, **options)

    monkeypatch.setattr(module, "open_checkpoints", watched)
    state = run(tmp_path, 16)
    due = [step for step in range(1, 17) if is_snapshot_step(step, 1)]
    assert len(due) > 6 and saved_steps(tmp_path) == due[-3:]
    assert max(held(tmp_path), max(most) + 2 * SIZE) < 2 * 4 * SIZE
    assert len(most) == len(due)
    expected = find_tracks(run(tmp_path / "other", due[-1]).opt_state).tracks[-1]["w"]
    np.testing.assert_allclose(read(tmp_path, due[-1]), expected, rtol=1e-3, atol=1e-4)
    assert int(state.step) == 16


def test_a_run_that_was_killed_makes_the_same_snapshots_again(tmp_path):
    run(tmp_path / "whole", 14)
    middle = run(tmp_path / "killed", 9)
    run(tmp_path / "killed", 12, middle)  # killed at 12; its last checkpoint is of step 9
    steps = saved_steps(tmp_path / "whole")
    run(tmp_path / "killed", 14, middle)
    assert saved_steps(tmp_path / "killed") == steps
    for step in steps:
        both = (read(tmp_path / name, step) for name in ("whole", "killed"))
        np.testing.assert_array_equal(*both)


def test_snapshots_do_not_depend_on_the_devices(tmp_path):
    run(tmp_path / "one", 5, every=5)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    place = lambda leaf: jax.device_put(leaf, split if leaf.ndim else whole)  # noqa: E731
    state = jax.tree.map(place, fresh())
    run(tmp_path / "four", 5, state, every=5)
    np.testing.assert_array_equal(read(tmp_path / "one", 5), read(tmp_path / "four", 5))


def test_none_are_kept_where_none_are_asked_for(tmp_path):
    run(tmp_path / "none", 4, count=0)
    assert not (tmp_path / "none").exists()


def test_one_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert int(run(tmp_path / "file" / "x", 1).step) == 1
    assert "the snapshot of step 1 is not kept" in caplog.text


def test_parameters_that_are_not_finite_end_the_training(tmp_path):
    broken = jax.jit(lambda state: (state._replace(params={"w": state.params["w"] * jnp.nan}), {}))
    hook = snapshots(tmp_path, count=3, every=1)
    _, stop = train(fresh(), lambda s, b: broken(s), iter(int, 1), [hook], num_steps=3)
    assert stop is not None and "params/w is not finite" in stop.reason and not stop.save
    assert saved_steps(tmp_path) == []


def test_every_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="snapshot_every = 0 should be at least 1"):
        snapshots(tmp_path, count=3, every=0)
