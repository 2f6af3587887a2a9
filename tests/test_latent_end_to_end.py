"""SDXL in miniature through the front door: train in latents, resume, sample from text, convert
both ways, and tell bad input in one sentence, writing nothing."""

import functools
import shutil

import numpy as np
import pytest
from PIL import Image
from support.commands import first_devices, succeed

from diffusion_jax.cli import main
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.train.checkpoints.reading import load_params

CONFIG = "configs/sdxl.py:tiny"
# As little to compile as there can be: no pictures during training, no test split.
QUICK = ["--no_test", "--config.hooks.images.batch_frequency=100", "--config.checkpoint.every=2"]
QUICK += ["--config.hooks.images.increase_log_steps=False", "--config.checkpoint.keep_last=9"]
DRAW = ["--prompt=a red fox", "--n=2", "--steps=2", "--batch_size=2"]


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_experiments")]
ok = functools.partial(succeed, devices=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_experiments):
    return tmp_path_factory.mktemp("latent")


@pytest.fixture(scope="module")
def run(folder):
    workdir = folder / "run"
    ok(f"--config={CONFIG}", f"--workdir={workdir}", *QUICK)
    return workdir


@pytest.fixture(scope="module")
def drawn(folder, run):
    ok("sample", f"--workdir={run}", *DRAW, f"--out={folder / 'drawn'}")
    return pixels(folder / "drawn")


@pytest.fixture(scope="module")
def single(folder, run):
    """The run as a single file of weights."""
    ok("convert", f"--from={run}", f"--to={folder / 'model.safetensors'}")
    return folder / "model.safetensors"


def pixels(out):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))])


def test_images_have_the_size_of_the_data(drawn):
    assert drawn.shape == (2, 32, 32, 3)
    assert drawn.std() > 5 and np.abs(drawn[0].astype(int) - drawn[1]).max() > 5


def test_frozen_networks_are_saved_once_and_not_with_every_checkpoint(run):
    names = {path.name for path in run.iterdir()}
    assert {"frozen", "checkpoints"} <= names
    sizes = {
        name: sum(f.stat().st_size for f in (run / name).rglob("*") if f.is_file())
        for name in ("frozen", "checkpoints/2")
    }
    assert sizes["frozen"] > 5e6  # two text encoders with 49,408 tokens each
    assert set(load_params(run / "checkpoints")) == {"network"}


def test_a_continued_run_has_the_same_frozen_networks_and_ends_bit_for_bit(folder, run):
    half = folder / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "checkpoints" / "4")  # as if it had ended at step 2
    assert "continues at step 2" in ok(f"--config={CONFIG}", f"--workdir={half}", *QUICK)
    ours, theirs = (load_params(place / "checkpoints", step=4) for place in (half, run))
    assert set(ours["network"]) == set(theirs["network"])
    for name, leaf in ours["network"]["out_2"].items():
        np.testing.assert_array_equal(leaf, theirs["network"]["out_2"][name])


@pytest.mark.parametrize("form", ["single", "diffusers"])
def test_a_converted_model_draws_the_same_pixels(folder, run, single, drawn, form):
    target = single
    if form == "diffusers":
        target = folder / "model"
        ok("convert", f"--from={run}", f"--to={target}", "--format=diffusers")
    out = folder / f"drawn_{form}"
    sample = ["sample", f"--checkpoint={target}", f"--config={CONFIG}", *DRAW, f"--out={out}"]
    ok(*sample)
    np.testing.assert_array_equal(pixels(out), drawn)


@pytest.mark.slow
def test_a_run_starts_from_a_released_file_and_continues_it_exactly(folder, single, drawn):
    workdir = folder / "converted"
    ok("convert", f"--from={single}", f"--config={CONFIG}", f"--to={workdir}",
       "--format=run")  # fmt: skip
    ok("sample", f"--workdir={workdir}", *DRAW, f"--out={folder / 'drawn_run'}")
    np.testing.assert_array_equal(pixels(folder / "drawn_run"), drawn)
    tuned = folder / "tuned"
    output = ok(f"--config={CONFIG}", f"--workdir={tuned}", *QUICK,
                f"--config.train.ckpt_path={single}", "--config.train.num_steps=1",
                "--config.optimizer.learning_rate=1e-20", "--config.optimizer.weight_decay=0.0",
                "--config.checkpoint.every=1", "--config.lr_schedule.warmup_steps=0")  # fmt: skip
    assert "0 parameters not loaded" in output
    ok("sample", f"--workdir={tuned}", *DRAW, f"--out={folder / 'drawn_tuned'}")
    np.testing.assert_array_equal(pixels(folder / "drawn_tuned"), drawn)


BAD = [
    (
        ["--prompt=" + "fox " * 2500],
        "(10000 characters) has 2500 tokens; a prompt has at most",
    ),
    (["--prompt=x", "--steps=-3"], "num_steps = -3 should be at least 1"),
    (["--prompt=x", "--guidance_scale=nan"], "guidance_scale = nan should be finite"),
    (["--prompt=x", "--height=33"], "height = 33, width = 32 should be multiples of 4 pixels"),
    (["--class=3"], 'this model reads text: give --prompt="..."'),
    (["--prompt=x", "--image={small}", "--strength=1.5"], "strength = 1.5 should lie in (0, 1]"),
    (["--prompt=x", "--image={small}"], "image needs strength"),
    (["--prompt=x", "--strength=0.5"], "strength = 0.5 needs an image"),
    (["--prompt=x", "--mask={small}"], "inpainting needs both image and mask"),
]


@pytest.fixture(scope="module")
def pipe(run):
    with first_devices(1):
        return Pipeline.from_workdir(run)


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_requests_are_one_sentence_and_write_nothing(
    run, pipe, folder, monkeypatch, capsys, flags, message
):
    # The weights are whole, and reading them takes seconds each time.
    monkeypatch.setattr(Pipeline, "from_workdir", lambda *_, **__: pipe)
    small = folder / "small.png"
    Image.new("RGB", (8, 8)).save(small)
    out = folder / "nothing"
    flags = [flag.format(small=small) for flag in flags]
    assert main(["sample", f"--workdir={run}", *flags, f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not out.exists()


def test_files_that_do_not_fit_are_one_sentence(folder, single, capsys):
    cut = folder / "cut.safetensors"
    cut.write_bytes(single.read_bytes()[:100_000])
    html = folder / "page.safetensors"
    html.write_text("<!DOCTYPE html><html>moved</html>")
    vae = folder / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    unchecked = "--config.train.ckpt_check=False"
    cases = [
        (cut, CONFIG, "is cut off"),
        (html, CONFIG, "is a web page, not weights"),
        (single, "configs/sd21.py:tiny", "contradicts the config: it says that the network"),
        (single, "configs/sd21.py:tiny", "the network here is a UNet", unchecked),
        (folder / "missing.safetensors", CONFIG, "there are no weights at"),
    ]
    if vae.exists():
        cases.append((vae, CONFIG, "holds no unet, but a vae"))
    for path, config, message, *more in cases:
        out = folder / "nothing"
        flags = [f"--checkpoint={path}", f"--config={config}", "--prompt=x", f"--out={out}"]
        assert main(["sample", *flags, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
        assert not out.exists()
