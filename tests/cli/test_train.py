"""`train` on the command line: which run it is, and what its end means to a script."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from support.experiments import built

from diffusion_jax.cli import main, train
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs.folder import save_config
from diffusion_jax.runs.training import Result, RunEvent
from diffusion_jax.train.loop import Stop

TINY = "configs/mnist.py:tiny"


@pytest.fixture
def asked(monkeypatch):
    """What the library was asked for; it stops as asked.stopped says."""
    calls = SimpleNamespace(stopped=None, config=TINY)

    def train_run(config, workdir, *, on_event, **options):
        calls.run = config, workdir, options
        on_event(RunEvent("saved", "step 8 is saved"))
        return Result(None, {}, 8, calls.stopped, built(calls.config))

    monkeypatch.setattr(train, "train_run", train_run)
    return calls


@pytest.mark.parametrize(
    ("stopped", "code", "said"),
    [
        (None, 0, "sample --workdir="),
        (Stop("early stopping"), 0, "sample --workdir="),
        (Stop("SIGTERM"), 75, "saved; the same command, or --resume="),
        (Stop("SIGINT"), 75, "goes on from here"),
        (Stop("loss is nan at step 3", save=False), 3, "step 8 is saved"),
    ],
)
def test_the_exit_code_says_how_it_ended(asked, workdir, capsys, stopped, code, said):
    asked.stopped = stopped
    assert main([f"--config={TINY}", f"--workdir={workdir}"]) == code
    output = capsys.readouterr().out
    assert output.startswith("step 8 is saved\n") and said in output


def test_a_model_that_draws_nothing_is_not_offered_to_draw(asked, workdir, capsys):
    asked.config = "configs/emoji_vae.py:tiny"
    assert main([f"--config={asked.config}", f"--workdir={workdir}"]) == 0
    assert "sample" not in capsys.readouterr().out


def test_flags_reach_the_library(asked, workdir):
    flags = ["--seed=5", "--no_test", "--debug", "--config.train.num_steps=3"]
    assert main([f"--config={TINY}", f"--workdir={workdir}", *flags]) == 0
    config, folder, options = asked.run
    assert (config.seed, config.train.num_steps, folder) == (5, 3, workdir)
    assert (options["resume"], options["donate"], options["test"]) == (True, False, False)


def test_without_a_folder_a_run_gets_a_new_one_of_its_config_and_time(asked, tmp_path):
    flags = [f"--logdir={tmp_path}", "--postfix=-small"]
    assert main([f"--config={TINY}", *flags]) == 0
    folder = asked.run[1]
    assert folder.parent == tmp_path and folder.name.endswith("_mnist-tiny-small")
    assert main([f"--config={TINY}", f"--logdir={tmp_path}", "--name=mine"]) == 0
    assert asked.run[1].name.endswith("_mine")


def test_resume_brings_its_config_and_step(asked, workdir):
    save_config(workdir, load_config(TINY, ["--config.seed=7"]))
    for step in (4, 8):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    assert main([f"--resume={workdir}", "--config.train.num_steps=20"]) == 0
    config, folder, options = asked.run
    assert (config.seed, config.train.num_steps, options["resume"]) == (7, 20, 8)
    assert folder == workdir
    assert main([f"--resume={workdir}/checkpoints/4"]) == 0
    assert asked.run[1:] == (workdir, {**options, "resume": 4})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_is_code_75(asked, workdir, capsys, monkeypatch, number):
    handler = signal.getsignal(number)

    def never_begins(*args, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(train, "train_run", never_begins)
    assert main([f"--config={TINY}", f"--workdir={workdir}"]) == 75
    said = capsys.readouterr().err
    assert f"{number.name}: nothing was to be saved; the same command goes on" in said
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to train: give --config=configs/mnist.py, or --resume=RUN"),
        (["--resume=x", f"--config={TINY}"], "--resume=x brings its own config and folder"),
        (["--resume=x", "--workdir=y"], "drop --config, --workdir and --name"),
        (["--resume=/nowhere"], "/nowhere"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(asked, capsys, flags, message):
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_new_run_among_the_logs_becomes_the_latest(asked, tmp_path, capsys):
    train._tell(None, RunEvent("starts", "x"))
    assert main([f"--config={TINY}", f"--logdir={tmp_path}"]) == 0
    workdir = asked.run[1]
    workdir.mkdir()
    train._tell(workdir, RunEvent("saved", "x"))
    assert not (tmp_path / "latest").exists()
    train._tell(workdir, RunEvent("starts", "x"))
    assert (tmp_path / "latest").resolve() == workdir
