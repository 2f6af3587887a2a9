"""Image to video in miniature through the front door: train, resume exactly, draw a clip."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from support.commands import succeed

from diffusion_jax.cli import main
from diffusion_jax.train.checkpoints.reading import load_params

CONFIG = "configs/moving_digits.py:tiny"
QUICK = ["--config.checkpoint.keep_last=9", "--config.train.num_steps=4"]
QUICK += ["--config.checkpoint.every=2", "--config.data.source.num_examples=32"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_experiments")]
ok = functools.partial(succeed, devices=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_experiments):
    return tmp_path_factory.mktemp("video")


@pytest.fixture(scope="module")
def run(folder):
    workdir = folder / "run"
    data = f"--config.data.source.data_dir={folder / 'data'}"
    ok(f"--config={CONFIG}", f"--workdir={workdir}", data, *QUICK)
    return workdir


def test_a_run_leaves_losses_and_contact_sheets(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {name: value for row in rows for name, value in row.items()}
    assert {"train/loss", "val/loss_x0", "val/loss_x0_ema", "test/loss_x0_ema"} <= set(values)
    assert all(np.isfinite(value) for value in values.values())
    sheet = Image.open(run / "images" / "train" / "samples_gs-000004.png")
    assert sheet.size == (4 * 18 + 2, 2 * 18 + 2)  # two clips, four frames of 16 px
    moving = Image.open(run / "images" / "val" / "clips_gs-000004.gif")
    assert moving.n_frames == 4 and moving.size == (2 * 18 + 2, 18 + 2)


def test_a_continued_run_ends_bit_for_bit(folder, run):
    half = folder / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "checkpoints" / "4")  # as if it had ended at step 2
    assert "continues at step 2" in ok(f"--resume={half}", "--no_test")
    for ema in (False, True):
        ours, theirs = (load_params(p / "checkpoints", step=4, ema=ema) for p in (half, run))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_picture_becomes_videos(folder, run, capsys):
    Image.new("RGBA", (40, 23), (255, 0, 0, 128)).save(folder / "picture.png")
    said = ok(
        "sample", f"--workdir={run}", f"--image={folder}/picture.png", "--n=2", "--num_frames=3",
        "--steps=2", f"--out={folder}/drawn",
    )  # fmt: skip
    assert "wrote 2 videos of 3 frames" in said
    names = {path.name for path in (folder / "drawn" / "00001").iterdir()}
    assert names == {"00000.png", "00001.png", "00002.png"}
    first, second = (Image.open(folder / f"drawn/0000{i}.gif") for i in range(2))
    assert first.n_frames == 3 and np.any(np.asarray(first) != np.asarray(second))
    assert main(["sample", f"--workdir={run}", f"--out={folder}/none"]) == 2
    assert "this model makes videos of a picture: give --image=FILE" in capsys.readouterr().err
