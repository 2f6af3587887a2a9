"""The shipped tiny config through the front door: train, be killed, resume exactly, sample,
report."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from support.commands import run, start

from diffusion_jax.cli import main
from diffusion_jax.train.checkpoints.reading import load_params, saved_steps

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12
TINY = "--config=configs/mnist.py:tiny"
# Bits per dimension take a network call for each timestep.
OVERRIDES = [f"--config.train.num_steps={STEPS}", "--config.checkpoint.keep_last=9"]
OVERRIDES += ["--config.schedule.num_timesteps=40"]
NO_PICTURES = [
    "--config.hooks.images.batch_frequency=1000",
    "--config.hooks.images.increase_log_steps=False",
]


pytestmark = pytest.mark.usefixtures("shared_experiments")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_experiments):
    return tmp_path_factory.mktemp("end_to_end")


def train(workdir, *more):
    return (TINY, f"--workdir={workdir}", *OVERRIDES, *more)


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nobody disturbs."""
    workdir = folder / "whole"
    code, output = run(*train(workdir))
    assert code == 0, output
    return workdir, output


def leaves(workdir, ema):
    params = load_params(workdir / "checkpoints", step=STEPS, ema=ema)
    return {str(path): np.asarray(leaf) for path, leaf in _flat(params)}


def _flat(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def test_a_run_leaves_what_it_promises(whole):
    workdir, output = whole
    assert "test/loss_simple" in output and " sample --workdir=" in output
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert {
        "train/loss", "lr", "perf/images_per_second", "perf/data_wait", "val/loss_simple",
        "val/loss_simple_ema", "test/loss_simple", "test/loss_simple_ema",
    } <= names  # fmt: skip
    assert all(np.isfinite(value) for row in rows for value in row.values())
    for split in ("train", "val"):
        for key in ("inputs", "samples", "diffusion_row", "denoise_row", "conditioning"):
            assert (workdir / "images" / split / f"{key}_gs-000004.png").is_file(), key
    assert list(workdir.glob("events.out.tfevents.*")) and (workdir / "parameters.txt").is_file()
    assert saved_steps(workdir / "checkpoints") == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_killed_run_continues_bit_for_bit(folder, whole, how):
    workdir = folder / how
    process = start(*train(workdir))
    deadline = time.monotonic() + 300
    while not saved_steps(workdir / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(getattr(signal, how))
    output = process.communicate()[0]
    steps = saved_steps(workdir / "checkpoints")
    assert steps[-1] < STEPS, output
    if how == "SIGTERM":
        assert process.returncode == 75 and "goes on from here" in output
    if how == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    code, output = run(*train(workdir))
    assert code == 0, output
    for ema in (False, True):
        expected, found = leaves(whole[0], ema), leaves(workdir, ema)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.slow
def test_resume_takes_a_run_or_one_of_its_checkpoints(folder, whole):
    workdir = folder / "resumed"
    shutil.copytree(whole[0], workdir)
    code, output = run(f"--resume={workdir / 'checkpoints' / '8'}", "--no_test")
    assert code == 0 and "continues at step 8" in output and "test/loss" not in output, output
    assert (workdir / "checkpoints" / "set_aside" / "12").is_dir()
    expected, found = leaves(whole[0], True), leaves(workdir, True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == sorted(set(steps))


def test_sample_writes_the_images_that_were_asked_for(folder, whole):
    for count in (2, 3):
        out = folder / f"samples{count}"
        code, output = run(
            "sample", f"--workdir={whole[0]}", "--class=3", f"--n={count}", "--steps=3",
            "--guidance_scale=2", f"--out={out}",
        )  # fmt: skip
        assert code == 0, output
        assert len(list(out.glob("0*.png"))) == count and (out / "grid.png").is_file()
    two, three = (
        np.asarray(Image.open(folder / f"samples{count}" / "00001.png"), int) for count in (2, 3)
    )
    # image i depends on (seed, i), not on how many are drawn; another batch size may round
    # otherwise
    assert np.abs(two - three).max() <= 1
    code, output = run("sample", f"--workdir={whole[0]}", "--class=10")
    assert code == 2 and "class 10 is out of range" in output and "Traceback" not in output


def test_report_and_evaluate_speak_of_the_run(folder, whole):
    command = [sys.executable, ROOT / "launch.py", "report", f"--workdir={whole[0]}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"step {STEPS} of {STEPS}" in output and "checkpoints: 4, 8, 12" in output
    code, output = run("evaluate", f"--workdir={whole[0]}", "--split=validation")
    assert code == 0 and "validation/loss_simple_ema" in output
    rows = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    logged = [row["val/loss_simple_ema"] for row in rows if "val/loss_simple_ema" in row][-1]
    printed = float(output.split("validation/loss_simple_ema")[1].split()[0])
    assert abs(printed - logged) < 1e-5 * abs(logged)


@pytest.mark.slow
def test_a_finished_run_trains_on_when_its_schedule_does(folder, whole):
    workdir = folder / "longer"
    shutil.copytree(whole[0], workdir)
    longer = [f"--resume={workdir}", f"--config.train.num_steps={STEPS + 2}", *NO_PICTURES]
    code, output = run(*longer, f"--config.lr_schedule.decay_steps={STEPS}")
    assert code == 2 and "a learning rate of 0 from step 12" in output, output
    code, output = run(*longer, "--no_test")  # decay_steps refers to num_steps
    assert code == 0 and saved_steps(workdir / "checkpoints")[-1] == STEPS + 2, output
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows if row["step"] == STEPS + 2 and "lr" in row][0] > 0


@pytest.mark.slow
def test_a_new_run_starts_from_the_weights_of_another(folder, whole):
    workdir = folder / "warm"
    code, output = run(
        *train(workdir, f"--config.train.ckpt_path={whole[0]}"),
        "--config.train.ckpt_ema=true", "--config.train.ignore_keys=('network/out_2',)",
        "--config.optimizer.learning_rate=1e-9", "--no_test", *NO_PICTURES,
    )  # fmt: skip
    assert code == 0 and "2 parameters not loaded\n  network/out_2/bias" in output, output
    ours, theirs = leaves(workdir, False), leaves(whole[0], True)
    for name, value in theirs.items():
        if "out_2" not in name:
            np.testing.assert_allclose(ours[name], value, atol=1e-6, err_msg=name)


BAD_INPUT = [
    ([TINY, "--config.data.splits.test=tset"], "tset"),
    ([TINY, "--config.loss.min_snr_gamma=-1"], "min_snr_gamma = -1"),
    ([TINY, "--config.train.ckpt_path=nowhere"], "nowhere"),
    ([TINY + "y"], "variant 'tinyy' is unknown; did you mean 'tiny'"),
    ([TINY, "--config.train.batch_size=7"], "batch_size = 7 should be a multiple of 8"),
    ([TINY, "--config.data.source.name=mnist_subst"], "mnist_subst"),
    ([TINY, "--config.data.source.name=cifar10"], "'cifar10' is not prepared"),
    (["--config=configs/nope.py"], "configs/nope.py does not exist"),
    ([TINY, "--config.model.model_channels=33"], "33"),
    (["--resume=/nowhere"], "/nowhere"),
    ([], "nothing to train"),
    ([TINY, "--config.data.batches.image_size=29"], "29"),
    ([TINY, "--config.sampler.num_steps=2000"], "num_steps = 2000"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, arguments, message, capsys):
    workdir = tmp_path / "run"
    place = [f"--workdir={workdir}"] if any("config=" in word for word in arguments) else []
    assert main([*arguments, *place]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and not workdir.exists()


@pytest.mark.slow
def test_a_read_only_or_foreign_folder_is_refused_before_any_work(tmp_path, whole, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    for workdir, more, message in (
        (foreign, (), "is not the folder of a run"),
        ("/proc/nowhere", (), "cannot write the run folder"),
        (whole[0], ("--config.optimizer.learning_rate=1.0",), "belongs to another config"),
        (
            tmp_path / "few",
            ("--config.data.splits.train=train[:4]",),
            "batch_size = 8 should be at most",
        ),
    ):
        assert main([TINY, f"--workdir={workdir}", *OVERRIDES, *more]) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(folder, whole, capsys):
    workdir = folder / "damaged"
    shutil.copytree(whole[0], workdir)
    largest = max((workdir / "checkpoints" / "12").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert main([TINY, f"--workdir={workdir}", *OVERRIDES]) == 2
    error = capsys.readouterr().err
    assert "12 is damaged" in error and "checkpoints/8" in error


@pytest.mark.slow
def test_a_corrupt_image_and_an_empty_folder_are_named(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    source = [
        "--config=configs/cifar10.py:tiny",
        "--config.data.source.name=image_folder",
        f"--workdir={tmp_path / 'run'}",
    ]
    config = tmp_path / "folder.py"
    text = (ROOT / "configs" / "cifar10.py").read_text()
    config.write_text(
        text.replace(
            'd(dict(name="mnist_subset"))', f'd(dict(name="image_folder", folder="{images}"))'
        )
    )
    source[0:2] = [f"--config={config}:tiny"]
    assert main(source) == 2
    assert str(images) in capsys.readouterr().err
    for i in range(20):
        (images / f"{i}.png").write_bytes(b"not an image")
    assert main(source) == 2
    assert "11 unreadable images" in capsys.readouterr().err
