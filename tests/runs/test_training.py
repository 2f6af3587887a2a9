"""train_run as a library: it returns what a run came to, and prints nothing."""

import json
import shutil
import threading

import jax
import numpy as np
import pytest
from support.commands import first_devices

from diffusion_jax import load_config, make_experiment, train_run
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs import folder
from diffusion_jax.runs.training import check_learning_rate, open_data
from diffusion_jax.train.checkpoints.reading import load_metadata, load_params, saved_steps
from diffusion_jax.train.checkpoints.saving import DamagedCheckpoint
from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.writers import read_jsonl

TINY = "configs/mnist.py:tiny"


def config(steps=4):
    changes = dict(num_steps=steps), dict(every=2, keep_last=3, keep_best=0)
    found = load_config(TINY)
    found.train.update(changes[0])
    found.checkpoint.update(changes[1])
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_experiments):
    workdir = tmp_path_factory.mktemp("library") / "run"
    said = []
    with first_devices(1):
        result = train_run(config(), workdir, on_event=said.append)
    return workdir, result, said


def test_the_result_is_what_the_run_came_to(trained):
    workdir, result, _ = trained
    assert (result.step, int(result.state.step), result.stopped) == (4, 4, None)
    averages = ema_params(result.state.opt_state)
    read = load_params(workdir / "checkpoints", averages, step=4, ema=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, averages, read))
    logged = {k: v for row in read_jsonl(workdir / "metrics.jsonl") for k, v in row.items()}
    names = {"val/loss_simple", "val/loss_simple_ema", "test/loss_simple", "test/loss_simple_ema"}
    assert names <= result.metrics.keys()
    for name in names:
        assert result.metrics[name] == pytest.approx(logged[name], rel=1e-6)


def test_events_come_in_order_with_sentences(trained):
    workdir, _, said = trained
    assert [event.kind for event in said] == ["starts", "compiling", "tested", "saved"]
    starts, _, tested, saved = (event.text for event in said)
    assert starts.startswith(f"{workdir} starts: ") and "training images of mnist_subset" in starts
    assert "loss_simple_ema" in tested and saved == f"step 4 is saved in {workdir}/checkpoints"


@pytest.mark.slow
def test_nothing_is_printed_and_any_thread_will_do(tmp_path, capfd, trained):
    # Signals can be noted in the main thread only; a service trains in another one.
    found = []
    with first_devices(1):
        thread = threading.Thread(
            target=lambda: found.append(train_run(config(), tmp_path / "run", test=False))
        )
        thread.start()
        thread.join(timeout=300)
    assert found and found[0].step == 4
    assert capfd.readouterr() == ("", "")
    same = jax.tree.map(np.array_equal, found[0].state.params, trained[1].state.params)
    assert jax.tree.all(same)  # the same config in another folder: the same bits


@pytest.mark.slow
def test_resume_says_what_to_do_with_a_run_that_is_there(tmp_path, trained):
    workdir, result, _ = trained
    with pytest.raises(ValueError, match="resume = False, but .* holds a run"):
        train_run(config(), workdir, resume=False)
    with first_devices(1):
        again = train_run(config(), tmp_path / "run")
        assert saved_steps(tmp_path / "run" / "checkpoints") == [2, 4]
        said = []
        from_2 = train_run(config(), tmp_path / "run", resume=2, on_event=said.append)
    assert "continues at step 2" in said[0].text
    same = jax.tree.map(np.array_equal, from_2.state.params, again.state.params)
    assert from_2.step == 4 and jax.tree.all(same)


def test_the_result_draws(trained):
    workdir, result, _ = trained
    with first_devices(1):
        images = Pipeline.from_workdir(workdir)([3], num_steps=2)
    assert images.shape == (1, 28, 28, 1) and result.experiment.drawing.num_steps == 4


def test_batches_are_finished_where_they_are_read(tmp_path):
    # Tokenising takes milliseconds that the device would wait for in the main thread.
    found = load_config("configs/emoji.py:tiny")
    experiment, threads = make_experiment(found, devices=jax.devices()[:1]), set()

    def with_inputs(batch):
        threads.add(threading.get_ident())
        return experiment.task.with_inputs(batch)

    task = experiment.task._replace(with_inputs=with_inputs)
    opened = open_data(experiment._replace(task=task), tmp_path)
    threads.clear()  # one record was read to see what the data have
    batch = next(opened.train.iterate(0))
    assert threads and threading.get_ident() not in threads
    (embedder,) = experiment.task.embedders.values()
    assert batch[embedder.input_key].dtype == np.int32


def test_a_run_is_drawn_with_another_sampler_and_keeps_its_model(trained):
    workdir, _, _ = trained
    with first_devices(1):
        other = Pipeline.from_workdir(
            workdir,
            overrides=[
                "--config.sampler.name=euler_ancestral",  # draws noise of its own
                "--config.sampler.discretize=delete",
                "--config.sampler.clip_denoised=delete",
            ],
        )
        plain = Pipeline.from_workdir(workdir)
        assert not np.array_equal(other([3], num_steps=2), plain([3], num_steps=2))
    wrong = "differs in model.model_channels: 32 -> 64: only config.sampler"
    with pytest.raises(ValueError, match=wrong):
        Pipeline.from_workdir(workdir, overrides=["--config.model.model_channels=64"])


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run, which a test may change."""
    return shutil.copytree(trained[0], tmp_path / "copy")


def edit_metadata(run, step, change):
    path = run / "checkpoints" / str(step) / "metadata" / "metadata"
    record = json.loads(path.read_text())
    change(record["metadata"])
    path.write_text(json.dumps(record))


def test_a_checkpoint_knows_what_it_was_made_from(trained):
    found = load_metadata(trained[0] / "checkpoints")
    assert found["config"]["lr_schedule"]["decay_steps"] == {
        "$of": {"$same": "train.num_steps"},
        "$ops": [["identity"]],
    }
    assert found["class_names"] == [str(digit) for digit in range(10)]
    assert {"train", "validation", "test"} == found["data"].keys()
    assert found["data"]["train"]["num_examples"] > 1000 and found["data"]["train"]["digest"]
    assert found["packages"]["jax"] == jax.__version__ and found["code"] and found["revision"]
    pipe = Pipeline.from_workdir(trained[0])
    assert pipe.class_names == tuple(found["class_names"])


@pytest.mark.slow
def test_a_run_goes_on_with_a_change_that_it_records(copy):
    said = []
    with first_devices(1):
        again = folder.load_saved_config(copy)
        train_run(
            again, copy, resume=2, change=["optimizer.learning_rate=1e-4"], on_event=said.append
        )
    assert said[0].kind == "changed"
    assert said[0].text == "from step 2 on, changed: optimizer.learning_rate = 0.0001 (was 0.002)"
    change = {"step": 2, "path": "optimizer.learning_rate", "old": 0.002, "new": 0.0001}
    assert folder.load_record(copy).changes == (change,)
    assert load_metadata(copy / "checkpoints", step=4)["changes"] == [change]
    rates = [row["lr"] for row in read_jsonl(copy / "metrics.jsonl") if "lr" in row]
    assert rates[-1] < 1e-4 < rates[0]
    with pytest.raises(ValueError, match="learning_rate: 0.0001 -> 0.002.*--change=PATH=VALUE"):
        train_run(config(), copy)


@pytest.mark.slow
def test_a_fork_has_all_of_its_checkpoint(trained, tmp_path):
    workdir, result, _ = trained
    with first_devices(1):
        new = train_run(config(), tmp_path / "new", fork=workdir / "checkpoints" / "2")
    same = jax.tree.map(np.array_equal, new.state, result.state)
    assert new.step == 4 and jax.tree.all(same)  # optimizer, averages, place in the data
    assert saved_steps(tmp_path / "new" / "checkpoints") == [2, 4]
    record = folder.load_record(tmp_path / "new")
    assert record.forked_from == f"{workdir}/checkpoints/2" and record.changes == ()
    assert saved_steps(workdir / "checkpoints") == [2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"].update(seed=3), "checkpoints/4 was made with .* seed: 3 -> 0"),
        (
            lambda m: m["data"]["train"].update(digest="x"),
            "changed since .*checkpoints/4: train: ot",
        ),
    ],
)
def test_what_does_not_fit_stops_before_anything_is_written(copy, change, message):
    edit_metadata(copy, 4, change)
    before = sorted((p, p.stat().st_mtime_ns) for p in copy.rglob("*") if p.is_file())
    with first_devices(1), pytest.raises(ValueError, match=message):
        train_run(config(8), copy)
    assert sorted((p, p.stat().st_mtime_ns) for p in copy.rglob("*") if p.is_file()) == before


def test_a_damaged_checkpoint_is_read_before_later_ones_are_moved(copy):
    files = [path for path in (copy / "checkpoints/2/state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with first_devices(1), pytest.raises(DamagedCheckpoint, match="checkpoints/2 is damaged"):
        train_run(config(), copy, resume=2)
    assert saved_steps(copy / "checkpoints") == [2, 4]
    assert not (copy / "checkpoints" / "set_aside").exists()


@pytest.mark.slow
def test_a_run_goes_on_when_the_weights_that_it_began_from_are_gone(copy, tmp_path, monkeypatch):
    made = config(2)
    monkeypatch.chdir(tmp_path)
    made.train.ckpt_path = "copy"  # relative
    with first_devices(1):
        train_run(made, tmp_path / "new", test=False)
        saved = folder.load_saved_config(tmp_path / "new")
        assert saved.train.ckpt_path == str(copy)
        shutil.rmtree(copy)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        saved.train.num_steps = 4
        assert train_run(saved, "../new", test=False).step == 4


def rates(values):
    values = jax.numpy.asarray(values, np.float32)
    return lambda step: values[jax.numpy.minimum(step, len(values) - 1)]


@pytest.mark.parametrize(
    ("values", "first"), [([1, 1, 0, 0], 2), ([0, 0, 0], 0), ([0], 0), ([1] + [0] * 9, 1)]
)
def test_a_learning_rate_that_ends_with_steps_of_0_is_told(values, first):
    message = f"learning rate of 0 from step {first} to the last, {len(values)}: nothing would"
    with pytest.raises(ValueError, match=message):
        check_learning_rate(rates(values), len(values))


def test_a_learning_rate_may_reach_0_at_its_end_or_be_0_in_between():
    for values in ([1, 0], [0, 1], [0, 0, 1], [1, 0, 0, 1, 0], [1] * 4990 + [0] * 4):
        check_learning_rate(rates(values), len(values))
    check_learning_rate(rates([1, 2]), 10**9)  # in little memory
    with pytest.raises(ValueError, match="learning rate of 0"):
        check_learning_rate(rates([1, 0]), 10**9)


@pytest.mark.slow
def test_a_run_that_was_stopped_early_says_so_again_and_ends(copy, monkeypatch):
    made = config(8)
    made.hooks.validation.every = 2
    made.hooks.early_stopping = dict(monitor="val/loss_simple", patience=1, min_delta=1e9)
    with first_devices(1):
        first, second = [], []
        stopped = train_run(made, copy, on_event=first.append, test=False)
        assert stopped.stopped is not None and stopped.step < 8
        again = train_run(made, copy, on_event=second.append, test=False)
    assert again.step == stopped.step and again.stopped == stopped.stopped
    told = [event.text for event in second if event.kind == "stopped"]
    assert told == [f"stopped at step {stopped.step}: {stopped.stopped.reason}"]
