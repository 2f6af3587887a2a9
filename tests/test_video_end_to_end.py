"""Image to video in miniature through the front door: train, resume exactly, draw a clip."""

import functools
import io
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from support.commands import succeed

from diffusion_jax.cli import main
from diffusion_jax.data.sources.open_source import open_source
from diffusion_jax.train.checkpoints.reading import load_params
from diffusion_jax.train.videos import save_clip

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


def test_video_files_train_as_the_clips_that_they_were_made_of(folder, caplog):
    """Moving digits as MP4 and GIF, read by PyAV: same pixels nearly, same rate, and a run."""
    pytest.importorskip("av")
    source = open_source("moving_digits", "train", data_dir=folder / "data", num_examples=32)
    clips = [
        np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in source[i]["video"]])
        for i in range(len(source))
    ]
    for i, clip in enumerate(clips):
        save_clip(folder / f"files/train/{i:05d}.{'mp4' if i else 'gif'}", clip, fps=8.0)
    save_clip(folder / "files/validation/00000.mp4", clips[0], fps=8.0)
    options = {"folder": str(folder / "files"), "num_frames": 16, "data_dir": folder / "data"}
    with caplog.at_level(logging.INFO):
        read = open_source("video_folder", "train", **options)
    assert (
        "holds videos: train 32" in caplog.text
    )  # said once in a process, so not again by the run below
    by_name = {read[i]["file_name"].decode(): read[i] for i in range(len(read))}
    assert len(by_name) == 32
    record = by_name["train/00001.mp4"]
    shown = np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in record["video"]])
    assert shown.shape == clips[1].shape and record["fps"] == 8.0
    assert np.abs(shown.astype(float) - clips[1]).mean() < 8
    ok(
        "--config=configs/moving_digits.py:videos_tiny", f"--workdir={folder / 'from_files'}",
        f"--config.data.source.folder={folder / 'files'}", "--config.data.source.fps=None",
        f"--config.data.source.data_dir={folder / 'data'}", "--config.data.splits.train=train",
        "--config.data.splits.validation=validation", "--config.train.num_steps=2", "--no_test",
        "--config.checkpoint.every=2",
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "from_files/metrics.jsonl").open()]
    assert np.isfinite([row["train/loss"] for row in rows if "train/loss" in row]).all()


def test_a_decoder_of_videos_is_trained_and_read_by_the_model_of_its_latents(folder):
    """An image autoencoder, a decoder of videos that starts from it, and SVD in its latents."""
    data = f"--config.data.source.data_dir={folder / 'data'}"
    few = ["--no_test", "--config.train.num_steps=2", "--config.checkpoint.every=2",
           "--config.hooks.images.batch_frequency=2"]  # fmt: skip
    same = ["--config.model.ch=8", "--config.model.num_groups=4", "--config.discriminator.ndf=8"]
    same += ["--config.model.attn_type=vanilla"]
    image, video, svd = (folder / name for name in ("image", "video", "svd"))
    ok("--config=configs/emoji_vae.py:tiny", f"--workdir={image}", *same, *few)
    said = ok("--config=configs/svd_decoder.py:tiny", f"--workdir={video}", data, *few,
              f"--config.train.ckpt_path={image}")  # fmt: skip
    assert "time_stack" in said and "0 parameters not used" in said
    assert (video / "images/train/clips_gs-000002.gif").exists()
    start, end = (load_params(run / "checkpoints", ema=False) for run in (image, video))
    kernel = lambda params: params["autoencoder"]["encoder"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel(start), kernel(end))
    stage = dict(ch=8, num_groups=4, weights=video)
    ok(
        "--config=configs/svd.py:tiny",
        f"--workdir={svd}",
        data,
        *few,
        "--config.data.source.num_examples=64",
        *(f"--config.first_stage.{name}={value}" for name, value in stage.items()),
        *(f"--config.conditioning.embedders.frame.{name}={value}" for name, value in stage.items()),
    )
