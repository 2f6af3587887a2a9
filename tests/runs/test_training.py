"""train_run as a library: it returns what a run came to, and prints nothing."""

import threading

import jax
import numpy as np
import pytest
from support.commands import first_devices

from diffusion_jax import load_config, make_experiment, train_run
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.training import open_data
from diffusion_jax.train.checkpoints.reading import load_params, saved_steps
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
    batch = next(open_data(experiment._replace(task=task), tmp_path).train.iterate(0))
    assert threads and threading.get_ident() not in threads
    (embedder,) = experiment.task.embedders.values()
    assert batch[embedder.input_key].dtype == np.int32


def test_a_run_is_drawn_with_another_sampler_and_keeps_its_model(trained):
    workdir, _, _ = trained
    with first_devices(1):
        other = Pipeline.from_workdir(
            workdir,
            overrides=[
                "--config.sampler.name=euler",
                "--config.sampler.discretize=delete",
                "--config.sampler.clip_denoised=delete",
            ],
        )
        plain = Pipeline.from_workdir(workdir)
        assert not np.array_equal(other([3], num_steps=2), plain([3], num_steps=2))
    wrong = "differs in model.model_channels: 32 -> 64: only config.sampler"
    with pytest.raises(ValueError, match=wrong):
        Pipeline.from_workdir(workdir, overrides=["--config.model.model_channels=64"])
