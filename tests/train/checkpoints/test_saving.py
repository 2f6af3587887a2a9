import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.train.checkpoints import folder as folder_module
from diffusion_jax.train.checkpoints import saving as checkpoint
from diffusion_jax.train.checkpoints.checksums import checksums
from diffusion_jax.train.checkpoints.saving import (
    DamagedCheckpoint,
    SaveFailed,
    load_metadata,
    load_params,
    open_checkpoints,
    resolve_checkpoint,
    restore_state,
    saved_steps,
    set_aside_later,
    state_bytes,
)
from diffusion_jax.train.ema import ema, ema_params
from diffusion_jax.train.state import init_state

METADATA = {"next_batch": 7, "seed": 3, "config": {"train": {"num_steps": 10}}, "git": "abc"}


def make_state(value=1.0, width=4, step=0, average=True):
    kernel = np.arange(3 * width, dtype=np.float32).reshape(3, width) + np.float32(value)
    params = {"network": {"a": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(width)}}}
    parts = [optax.clip_by_global_norm(1.0), optax.adamw(1e-2)]
    tx = optax.chain(*parts, ema(0.9)) if average else optax.chain(*parts)
    state = init_state(params, tx, {"batch_stats": {"mean": jnp.ones(2)}})
    return state._replace(step=jnp.asarray(step, jnp.int32))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def write(directory, *steps, **options):
    checkpoints = open_checkpoints(directory, **{"keep_last": 9, **options})
    for step in steps:
        checkpoints.save(step, make_state(step, step=step), METADATA | {"next_batch": step})
    checkpoints.close()


def test_round_trip_is_exact_and_typed(tmp_path):
    state = make_state(step=7)
    checkpoints = open_checkpoints(tmp_path / "a" / "checkpoints")
    assert checkpoints.save(7, state, METADATA) is True
    restored, metadata = checkpoints.restore(abstract(state))
    assert_same(restored, state)
    assert type(restored) is type(state)
    assert metadata == METADATA
    assert (checkpoints.all_steps(), checkpoints.latest_step()) == ([7], 7)
    checkpoints.close()
    assert load_metadata(tmp_path / "a" / "checkpoints") == METADATA


def test_saved_buffers_may_be_donated_at_once(tmp_path):
    state = make_state(step=1)
    expected = jax.tree.map(np.array, state)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, state, METADATA)
    destroy = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    destroy(state)
    restored, _ = checkpoints.restore(abstract(make_state()))
    assert_same(restored, expected)
    checkpoints.close()


def test_restores_into_other_shardings(tmp_path):
    mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
    state = make_state(width=16)
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def place(x):
        return jax.device_put(x, split if x.ndim == 2 else whole)

    sharded = jax.tree.map(place, state)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, sharded, METADATA)
    checkpoints.close()
    assert_same(restore_state(tmp_path, abstract(state))[0], state)
    back = restore_state(tmp_path, abstract(sharded))[0]
    assert back.params["network"]["a"]["kernel"].sharding == split
    assert_same(back, state)


def test_saving_a_step_twice_does_nothing(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(3, make_state(1.0), METADATA)
    assert checkpoints.save(3, make_state(2.0), METADATA) is False
    restored, _ = checkpoints.restore(abstract(make_state()), 3)
    assert_same(restored, make_state(1.0))
    checkpoints.close()


def test_an_older_step_than_the_newest_is_not_saved_in_silence(tmp_path):
    write(tmp_path, 10, 20)
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="cannot save step 15 .* later step 20"):
        checkpoints.save(15, make_state(), METADATA)
    checkpoints.close()


def test_set_aside_later_keeps_everything(tmp_path):
    write(tmp_path, 10, 20, 30)
    assert set_aside_later(tmp_path, 10) == [20, 30]
    assert saved_steps(tmp_path) == [10]
    write(tmp_path, 20)
    assert set_aside_later(tmp_path, 10) == [20]
    assert sorted(p.name for p in (tmp_path / "set_aside").iterdir()) == ["20", "20.2", "30"]
    write(tmp_path, 15)
    assert saved_steps(tmp_path) == [10, 15]


def test_going_back_reads_first_and_then_moves_the_later_ones(tmp_path):
    write(tmp_path, 10, 20, 30)
    truncate(tmp_path / "20" / "metadata" / "metadata")
    checkpoints = open_checkpoints(tmp_path, keep_last=9)
    with pytest.raises(DamagedCheckpoint, match=f"{tmp_path / '20'} is damaged"):
        checkpoints.go_back(abstract(make_state()), 20)
    assert checkpoints.all_steps() == saved_steps(tmp_path) == [10, 20, 30]
    state, metadata = checkpoints.go_back(abstract(make_state()), 10)
    assert_same(state, make_state(10, step=10))
    assert metadata["next_batch"] == 10
    assert checkpoints.all_steps() == saved_steps(tmp_path) == [10]
    assert sorted(p.name for p in (tmp_path / "set_aside").iterdir()) == ["20", "30"]
    assert checkpoints.save(15, make_state(step=15), METADATA)
    checkpoints.close()


def test_what_was_set_aside_can_be_gone_back_to(tmp_path):
    workdir, directory = tmp_path, tmp_path / "checkpoints"
    write(directory, 10, 20, 30)
    set_aside_later(directory, 10)
    write(directory, 15, 40)
    found, step = resolve_checkpoint(directory / "set_aside" / "20")
    assert (Path(found), step) == (workdir, 20)
    checkpoints = open_checkpoints(directory, keep_last=9)
    state, _ = checkpoints.go_back(abstract(make_state()), step)
    assert_same(state, make_state(20, step=20))
    assert checkpoints.all_steps() == [10, 15, 20]
    assert sorted(p.name for p in (directory / "set_aside").iterdir()) == ["30", "40"]
    checkpoints.close()


def test_what_was_set_aside_takes_the_place_of_another(tmp_path):
    directory = tmp_path / "checkpoints"
    for seed in (1, 2, 3):  # 20, 20.2 in set_aside, and a third in its place
        with contextlib.closing(open_checkpoints(directory)) as checkpoints:
            checkpoints.save(20, make_state(seed, step=20), METADATA)
        if seed < 3:
            set_aside_later(directory, 10)
    for name, seed, left in (
        ("set_aside/20.2", 2, ["20", "20.3"]),
        ("set_aside/20", 1, ["20.2", "20.3"]),
    ):
        _, step = resolve_checkpoint(directory / name)
        assert step == name
        with contextlib.closing(open_checkpoints(directory)) as checkpoints:
            state, _ = checkpoints.go_back(abstract(make_state()), step)
        assert_same(state, make_state(seed, step=20))
        assert saved_steps(directory) == [20]
        assert_same(restore_state(directory, abstract(make_state()))[0], state)
        assert sorted(path.name for path in (directory / "set_aside").iterdir()) == left


def keep(tmp_path, values, **options):
    checkpoints = open_checkpoints(tmp_path, **options)
    for step, value in values.items():
        metrics = None if value is None else {"val/loss": value}
        checkpoints.save(step, make_state(), METADATA, metrics)
    checkpoints.close()
    return saved_steps(tmp_path)


def test_keeps_the_newest(tmp_path):
    assert keep(tmp_path, dict.fromkeys([1, 2, 3, 4]), keep_last=2) == [3, 4]


def test_keeps_every_so_many(tmp_path):
    kept = keep(tmp_path, dict.fromkeys([5, 10, 15, 20, 25]), keep_last=1, keep_every=10)
    assert kept == [10, 20, 25]


@pytest.mark.parametrize("mode, best", [("min", [2, 4]), ("max", [1, 3])])
def test_keeps_the_best_and_never_loses_the_newest(tmp_path, mode, best):
    values = {1: 5.0, 2: 3.0, 3: 9.0, 4: 4.0, 5: float("nan"), 6: None, 7: 4.5}
    kept = keep(tmp_path, values, keep_last=1, keep_best=2, monitor="val/loss", mode=mode)
    assert kept == [*best, 7]


def test_best_are_remembered_across_runs(tmp_path):
    options = dict(keep_last=1, keep_best=1, monitor="val/loss")
    keep(tmp_path, {1: 3.0, 2: 5.0}, **options)
    assert keep(tmp_path, {3: 4.0, 4: 6.0}, **options) == [1, 4]
    checkpoints = open_checkpoints(tmp_path, **options)
    assert checkpoints.is_best({"val/loss": 2.0})
    assert not checkpoints.is_best({"val/loss": 3.5})
    assert not checkpoints.is_best({"val/loss": float("nan")})
    checkpoints.close()


def test_a_monitor_that_validation_does_not_report(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep_best=1, monitor="val/lossy")
    message = "watches 'val/lossy', which validation does not report; it reports a, val/loss$"
    with pytest.raises(ValueError, match=message):
        checkpoints.is_best({"val/loss": 1.0, "a": 2.0})
    checkpoints.close()


def test_a_step_saved_before_its_validation_gets_its_metrics_later(tmp_path):
    options = dict(keep_last=1, keep_best=1, monitor="val/loss")
    checkpoints = open_checkpoints(tmp_path, **options)
    checkpoints.save(1, make_state(1.0), METADATA)
    assert checkpoints.save(1, make_state(2.0), METADATA, {"val/loss": 3.0}) is False
    assert checkpoints.save(1, make_state(2.0), METADATA, {"val/loss": 9.0}) is False
    assert checkpoints.is_best({"val/loss": 2.5})
    assert not checkpoints.is_best({"val/loss": 3.5})
    checkpoints.save(2, make_state(), METADATA)
    checkpoints.save(3, make_state(), METADATA)
    assert checkpoints.all_steps() == [1, 3]
    assert_same(checkpoints.restore(abstract(make_state()), 1)[0], make_state(1.0))
    checkpoints.close()
    assert keep(tmp_path, {4: 4.0, 5: None}, **options) == [1, 5]
    assert keep(tmp_path, {6: 2.0, 7: None}, **options) == [6, 7]


def test_saving_without_metrics_is_no_cause_for_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "absl")
    keep(tmp_path, {1: None, 2: 3.0, 3: None}, keep_best=1, monitor="val/loss")
    assert caplog.messages == []
    logging.getLogger("absl").warning("another one, did not provide metrics")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep_last": 0}, "keep_last = 0 should be at least 1"),
        ({"keep_every": 0}, "keep_every = 0 should be at least 1"),
        ({"keep_best": -1, "monitor": "a"}, "keep_best = -1 should be at least 0"),
        ({"keep_best": 2}, "keep_best = 2 needs a monitor"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoints(tmp_path, **options)


def test_nothing_there(tmp_path):
    state = abstract(make_state())
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
            restore_state(directory, state)
    write(tmp_path, 10, 20)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 15 .* 10, 20"):
        restore_state(tmp_path, state, 15)


def test_another_config_is_named_and_not_called_damage(tmp_path):
    write(tmp_path, 10, 20)
    with pytest.raises(ValueError, match=r"20 is of another config.*float32\[3, 4\], not") as error:
        restore_state(tmp_path, abstract(make_state(width=8)))
    assert not isinstance(error.value, DamagedCheckpoint)
    assert "params/network/a/bias" in str(error.value)
    with pytest.raises(ValueError, match="it holds opt_state/2/num_updates"):
        restore_state(tmp_path, abstract(make_state(average=False)))
    wider = make_state()
    wider.params["network"]["b"] = {"kernel": jnp.zeros(3)}
    with pytest.raises(ValueError, match="it lacks params/network/b/kernel"):
        restore_state(tmp_path, abstract(wider))


def biggest(state):
    return max((state / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip(path, at=0.5):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 16
    path.write_bytes(bytes(raw))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "empty step": lambda d: [shutil.rmtree(d), d.mkdir()],
    "no state": lambda d: shutil.rmtree(d / "state"),
    "no metadata": lambda d: shutil.rmtree(d / "metadata"),
    "metadata cut": lambda d: truncate(d / "metadata" / "metadata"),
    "metadata not ours": lambda d: (d / "metadata" / "metadata").write_text('{"a": 1}'),
    "metadata a list": lambda d: (d / "metadata" / "metadata").write_text("[1]"),
    "description cut": lambda d: truncate(d / "state" / "_METADATA"),
    "description gone": lambda d: (d / "state" / "_METADATA").unlink(),
    "data cut": lambda d: truncate(biggest(d / "state")),
    "data empty": lambda d: biggest(d / "state").write_bytes(b""),
    "data gone": lambda d: biggest(d / "state").unlink(),
    "manifest gone": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
    "manifest cut": lambda d: truncate(d / "state" / "manifest.ocdbt"),
}


# tensorstore leaves reads behind that report to an event loop which is gone
noisy = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@noisy
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_the_newest_whole_checkpoint(tmp_path, damage):
    write(tmp_path, 10, 20)
    DAMAGE[damage](tmp_path / "20")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamagedCheckpoint) as error:
        restore_state(tmp_path, abstract(make_state()))
    message = str(error.value)
    assert f"the checkpoint {tmp_path / '20'} is damaged" in message
    assert message.endswith(f"the newest whole one before it is {tmp_path / '10'}")
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before
    restored, _ = restore_state(tmp_path, abstract(make_state()), 10)
    assert_same(restored, make_state(10, step=10))


def test_damage_everywhere(tmp_path):
    write(tmp_path, 10, 20)
    for step in ("10", "20"):
        truncate(tmp_path / step / "metadata" / "metadata")
    with pytest.raises(DamagedCheckpoint, match="there is no whole one before it"):
        restore_state(tmp_path, abstract(make_state()))


@noisy
def test_a_run_stops_at_damage_unless_told_to_take_the_previous_one(tmp_path, caplog):
    write(tmp_path, 10, 20, 30, 40)
    truncate(biggest(tmp_path / "40" / "state"))
    truncate(tmp_path / "30" / "metadata" / "metadata")
    checkpoints = open_checkpoints(tmp_path, keep_last=9)
    with pytest.raises(
        DamagedCheckpoint, match=r"/40 is damaged.*is .*/20; on_damage = 'previous'"
    ):
        checkpoints.restore(abstract(make_state()))
    checkpoints.close()
    assert saved_steps(tmp_path) == [10, 20, 30, 40]
    checkpoints = open_checkpoints(tmp_path, keep_last=9, on_damage="previous")
    state, metadata = checkpoints.restore(abstract(make_state()))
    assert_same(state, make_state(20, step=20))
    assert metadata["next_batch"] == 20
    assert f"{tmp_path / '40'} is damaged" in caplog.text and "which is used" in caplog.text
    assert checkpoints.latest_step() == 20
    assert sorted(path.name for path in (tmp_path / "set_aside").iterdir()) == ["30", "40"]
    assert checkpoints.save(30, make_state(3, step=30), METADATA)  # where the damaged one was
    checkpoints.close()
    restored, _ = restore_state(tmp_path, abstract(make_state()))
    assert_same(restored, make_state(3, step=30))


def test_damaged_metrics_are_named_and_may_be_deleted(tmp_path):
    options = dict(keep_last=9, keep_best=1, monitor="val")
    checkpoints = open_checkpoints(tmp_path, **options)
    for step in (10, 20):
        checkpoints.save(step, make_state(step, step=step), METADATA, {"val": float(step)})
    checkpoints.close()
    path = tmp_path / "10" / "metrics" / "metrics"
    truncate(path)
    with pytest.raises(DamagedCheckpoint, match=f"^{path} is damaged; delete it"):
        open_checkpoints(tmp_path, **options)
    path.unlink()
    checkpoints = open_checkpoints(tmp_path, **options)
    assert checkpoints.is_best({"val": 15.0}) and not checkpoints.is_best({"val": 25.0})
    checkpoints.close()


@noisy
def test_no_policy_helps_when_all_are_damaged(tmp_path):
    write(tmp_path, 10, 20)
    for step in ("10", "20"):
        truncate(tmp_path / step / "metadata" / "metadata")
    checkpoints = open_checkpoints(tmp_path, keep_last=9, on_damage="previous")
    with pytest.raises(DamagedCheckpoint, match="there is no whole one before it"):
        checkpoints.restore(abstract(make_state()))
    checkpoints.close()
    assert saved_steps(tmp_path) == [10, 20]


@noisy
def test_flipped_bits_never_come_back_as_values(tmp_path):
    """A flip may hit padding, an index or a value; the state is right or there is an error."""
    state = make_state(20, step=20)
    write(tmp_path, 10, 20)
    whole = biggest(tmp_path / "20" / "state").read_bytes()
    errors = []
    for at in np.linspace(0.02, 0.98, 12):
        flip(biggest(tmp_path / "20" / "state"), at)
        try:
            assert_same(restore_state(tmp_path, abstract(state))[0], state)
        except DamagedCheckpoint as error:
            errors.append(str(error))
        biggest(tmp_path / "20" / "state").write_bytes(whole)
    assert len(errors) >= 6


def test_a_wrong_value_is_named(tmp_path):
    """What a flip in an uncompressed value does: only the checksum can tell."""
    write(tmp_path, 10)
    path = tmp_path / "10" / "metadata" / "metadata"
    record = json.loads(path.read_text())
    record["checksums"]["params/network/a/kernel"] ^= 1
    path.write_text(json.dumps(record))
    with pytest.raises(DamagedCheckpoint, match="values of params/network/a/kernel are not"):
        restore_state(tmp_path, abstract(make_state()))
    with pytest.raises(DamagedCheckpoint, match="values of params/network/a/kernel are not"):
        load_params(tmp_path, ema=False)
    load_params(tmp_path, ema=True)


def rewrite(directory, step, change):
    path = directory / str(step) / "metadata" / "metadata"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_checkpoint_with_the_first_checksums_is_still_read_and_checked(tmp_path):
    def as_first_written(record):
        del record["format"]
        record["checksums"] = checksums(make_state(10, step=10), version=1)

    write(tmp_path, 10)
    rewrite(tmp_path, 10, as_first_written)
    state, metadata = restore_state(tmp_path, abstract(make_state()))
    assert_same(state, make_state(10, step=10))
    assert metadata == METADATA | {"next_batch": 10}
    load_params(tmp_path)
    rewrite(tmp_path, 10, lambda record: record["checksums"].update({"step": 1}))
    with pytest.raises(DamagedCheckpoint, match="values of step are not the ones that were saved"):
        restore_state(tmp_path, abstract(make_state()))


def test_a_checkpoint_of_a_newer_version_is_named_and_not_called_damage(tmp_path):
    write(tmp_path, 10)
    rewrite(tmp_path, 10, lambda record: record.update(format=99))
    with pytest.raises(ValueError, match=r"/10 has format = 99, which should be one of 1, 2: it"):
        restore_state(tmp_path, abstract(make_state()))


def test_swapped_halves_of_a_kernel_are_not_restored(tmp_path):
    """What is written beside the checksums of other values, as if the disk had exchanged blocks."""
    kernel = np.random.default_rng(0).normal(size=(256, 256)).astype(jnp.bfloat16)
    kernel = kernel.astype(np.float32)
    swapped = np.concatenate([kernel[128:], kernel[:128]])
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, {"kernel": jnp.asarray(swapped)}, METADATA)
    checkpoints.close()
    like = {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    restore_state(tmp_path, like)
    original = checksums({"kernel": kernel})
    rewrite(tmp_path, 1, lambda record: record.update(checksums=original))
    with pytest.raises(DamagedCheckpoint, match="values of kernel are not"):
        restore_state(tmp_path, like)


def test_params_and_their_average_alone(tmp_path):
    state = make_state(step=5)
    averaged = jax.tree.map(lambda x: x + 0.5, state.params)
    *rest, last = state.opt_state
    state = state._replace(opt_state=(*rest, last._replace(params=averaged)))
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(5, state, METADATA)
    checkpoints.close()
    assert_same(ema_params(state.opt_state), averaged)
    assert_same(load_params(tmp_path), averaged)
    assert_same(load_params(tmp_path, ema=False), state.params)
    typed = load_params(tmp_path, abstract(state.params), step=5)
    assert_same(typed, averaged)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(typed))
    shapes = jax.eval_shape(lambda: state.params)
    assert_same(load_params(tmp_path, shapes), averaged)


def test_params_of_another_config_or_without_average(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(5, make_state(average=False), METADATA)
    checkpoints.close()
    with pytest.raises(ValueError, match="holds 0 averages.*ema=False"):
        load_params(tmp_path)
    with pytest.raises(ValueError, match="5 is of another config: it has other shapes"):
        load_params(tmp_path, abstract(make_state(width=8).params), ema=False)


def test_what_resume_may_name(tmp_path):
    workdir = tmp_path / "run"
    write(workdir / "checkpoints", 10, 20)
    newest, first = (workdir, 20), (workdir, 10)
    for path, expected in [
        (workdir, newest),
        (workdir / "checkpoints", newest),
        (workdir / "checkpoints" / "10", first),
        (workdir / "checkpoints" / "10" / "state" / "_METADATA", first),
    ]:
        found, step = resolve_checkpoint(path)
        assert (Path(found), step) == expected
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_checkpoint(workdir / "checkpoints" / "30")
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*checkpoints"):
        resolve_checkpoint(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write checkpoints to .*file/checkpoints: Not a dir"):
        open_checkpoints(tmp_path / "file" / "checkpoints")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write checkpoints to .*: Permission denied"):
        open_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_refuses(tmp_path, monkeypatch, code):
    def refuse(self, data):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(type(checkpoint.epath.Path(tmp_path)), "write_bytes", refuse)
    with pytest.raises(OSError, match=f"cannot write checkpoints to .*: {os.strerror(code)}"):
        open_checkpoints(tmp_path / "checkpoints")


def test_a_disk_that_is_too_small(tmp_path):
    with pytest.raises(OSError, match="one needs up to 1048576.00 GiB and .* GiB are free"):
        open_checkpoints(tmp_path, needed_bytes=2**50)
    assert state_bytes(abstract(make_state())) == 4 * (4 * 16 + 2 + 3)
    assert list(tmp_path.iterdir()) == []


def test_half_written_checkpoints_are_cleared(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "20.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "15.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert saved_steps(tmp_path) == [10]
    write(tmp_path, 20)
    assert saved_steps(tmp_path) == [10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]


def large(step):
    """A state whose arrays do not fit a file of `no_space`."""
    values = np.random.default_rng(step).normal(size=(300, 300)).astype(np.float32)
    return {"step": jnp.int32(step), "w": jnp.asarray(values)}


def no_space(run):
    """Call run() while no file may grow beyond 20 kB, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_until_over():
    """Let Orbax's threads finish without looking at their result."""
    for thread in threading.enumerate():
        if thread.name in ("save_finalize", "async_save"):
            threading.Thread.join(thread, 60)


@pytest.mark.slow
@noisy
def test_a_save_that_failed_does_not_fail_the_ones_after_it(tmp_path, caplog, capfd):
    checkpoints = open_checkpoints(tmp_path, keep_last=9)
    checkpoints.save(1, large(1), METADATA)
    checkpoints.wait()

    def fail():
        checkpoints.save(2, large(2), METADATA)
        wait_until_over()

    no_space(fail)
    assert checkpoints.save(3, large(3), METADATA)
    checkpoints.wait()
    assert checkpoints.all_steps() == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    (message,) = caplog.messages
    assert message.startswith(f"cannot save step 2 in {tmp_path}: File too large (")
    assert "GiB are free); training goes on" in message and "\n" not in message
    assert capfd.readouterr().err.count("\n") == 0
    assert_same(checkpoints.restore(large(3))[0], large(3))
    checkpoints.close()


FULL = textwrap.dedent(
    """
    import resource, sys, threading
    import jax.numpy as jnp, numpy as np
    from diffusion_jax.train.checkpoints.saving import open_checkpoints

    def state(n):
        values = np.random.default_rng(n).normal(size=(30, 60, 60)).astype(np.float32)
        return {f"w{i}": jnp.asarray(value) for i, value in enumerate(values)}

    checkpoints = open_checkpoints(sys.argv[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    checkpoints.save(1, state(1), {})
    for thread in threading.enumerate():
        if thread.name in ("save_finalize", "async_save"):
            threading.Thread.join(thread, 60)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(2, state(2), {})
    checkpoints.close()
    """
)


def test_a_save_that_failed_is_one_line_on_stderr(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    # JAX would warn where its own cache cannot grow either.
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=env)
    line, *others = done.stderr.splitlines()
    assert "cannot save step 1" in line and "File too large" in line and not others, done.stderr
    assert saved_steps(tmp_path) == [2]


@pytest.mark.slow
@noisy
@pytest.mark.parametrize("end", ["wait", "close"])
def test_the_last_save_says_itself_that_it_failed(tmp_path, caplog, end):
    checkpoints = open_checkpoints(tmp_path, keep_last=9)

    def fail():
        checkpoints.save(2, large(2), METADATA)
        with pytest.raises(SaveFailed, match=f"^cannot save step 2 in {tmp_path}: .* GiB are fr"):
            getattr(checkpoints, end)()

    no_space(fail)
    assert caplog.messages == []
    if end == "wait":
        assert checkpoints.save(2, large(2), METADATA)  # the same step, once there is space again
        checkpoints.close()
        assert saved_steps(tmp_path) == [2]


@noisy
def test_a_save_that_cannot_start_is_one_sentence_and_the_next_one_is_tried(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(SaveFailed, match=f"^cannot save step 1 in {tmp_path}: .*set"):
        checkpoints.save(1, large(1), {"config": {1, 2}})  # a set is no JSON
        checkpoints.wait()
    assert checkpoints.save(1, large(1), METADATA)
    checkpoints.close()
    assert saved_steps(tmp_path) == [1]


def test_a_folder_that_is_gone_is_told_and_begun_again(tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    checkpoints = open_checkpoints(directory)
    checkpoints.save(1, make_state(1, step=1), METADATA)
    checkpoints.wait()
    directory.rename(tmp_path / "moved")
    assert checkpoints.save(1, make_state(1, step=1), METADATA)  # what was saved there is not here
    checkpoints.wait()
    (message,) = caplog.messages
    assert message.startswith(f"{directory} is gone (deleted, moved or unmounted)")
    shutil.rmtree(directory)
    directory.write_text("a file")
    caplog.clear()
    sentence = f"cannot save step 2 in {directory}: Not a directory"
    assert checkpoints.save(2, make_state(2, step=2), METADATA)
    with pytest.raises(SaveFailed, match=f"^{sentence}$"):
        checkpoints.wait()
    assert checkpoints.save(2, make_state(2, step=2), METADATA)
    directory.unlink()
    assert checkpoints.save(3, make_state(3, step=3), METADATA)
    checkpoints.close()
    assert [m for m in caplog.messages if "cannot" in m] == [
        f"{sentence}; training goes on, and the next checkpoint is tried"
    ]
    assert saved_steps(directory) == [3] and saved_steps(tmp_path / "moved") == [1]


def test_waiting_for_a_save_has_an_end(tmp_path, monkeypatch):
    checkpoints = open_checkpoints(tmp_path)
    monkeypatch.setattr(folder_module, "_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "is_saving_in_progress", lambda self: 1)
    for end in (checkpoints.wait, checkpoints.close):
        with pytest.raises(SaveFailed, match="it did not end within 0 s"):
            end()


SCRIPT = textwrap.dedent(
    """
    import jax, jax.numpy as jnp, numpy as np, optax
    from diffusion_jax.train.checkpoints.saving import open_checkpoints, saved_steps
    from diffusion_jax.train.ema import ema
    from diffusion_jax.train.hooks.checkpoint import checkpoint
    from diffusion_jax.train.loop import Hook, train
    from diffusion_jax.train.state import init_state

    tx = optax.chain(optax.adamw(1e-2), ema())

    def init():
        return init_state({"w": jnp.ones((64, 64))}, tx)

    @jax.jit
    def update(state, batch):
        key = jax.random.fold_in(jax.random.key(0), state.step)
        noise = jax.random.normal(key, (64, 64))
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean((p["w"] - batch * noise) ** 2))(
            state.params
        )
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {"loss": loss}

    def step(state, batch):
        return update(state, jax.device_put(batch))

    def batches(n):
        while True:
            yield np.float32(np.sin(n))
            n += 1

    def run(directory, more_steps):
        checkpoints = open_checkpoints(directory)
        state, first = init(), 0
        if saved_steps(directory):
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
            state, metadata = checkpoints.restore(abstract)
            first = metadata["next_batch"]
        hooks = [
            Hook(lambda s: True, lambda e: print(e.step, flush=True)),
            checkpoint(checkpoints, {"seed": 0}, every=5),
        ]
        state, _ = train(state, step, batches(first), hooks, num_steps=first + more_steps)
        checkpoints.close()
        return first, state
    """
)


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    killed = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + f"run({str(tmp_path)!r}, 10**6)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.strip() == "33":
            time.sleep(0.05)  # a save may be under way
            break
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL
    here: dict = {}
    exec(SCRIPT, here)
    killed_at = saved_steps(tmp_path)[-1]
    first, resumed = here["run"](tmp_path, 20)
    assert first == killed_at >= 20
    whole, _ = here["train"](
        here["init"](), here["step"], here["batches"](0), [], num_steps=first + 20
    )
    assert int(resumed.step) == first + 20
    assert jax.tree.structure(resumed) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
