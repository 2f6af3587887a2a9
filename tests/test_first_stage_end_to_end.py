"""A VQ first stage through the front door: train it, then a latent model on it, online and from a
cache, and draw; convert it to the file of another program, and go on from that."""

import functools

import numpy as np
import pytest
from PIL import Image
from support.commands import succeed

from diffusion_jax.train.checkpoints.reading import load_params

pytestmark = pytest.mark.slow

QUICK = ["--no_test", "--config.hooks.images.batch_frequency=100", "--config.train.num_steps=2"]
QUICK += ["--config.hooks.images.increase_log_steps=False", "--config.checkpoint.every=2"]
# emoji_ldm:tiny in the latents of vq_f4:tiny.
STAGE = dict(
    name="autoencoder_vq", num_codes=16, embed_dim=3, z_channels=3, ch=32, num_groups=32,
    attn_type="vanilla", scale_by_std=True,
)  # fmt: skip
LATENT = ["--config=configs/emoji_ldm.py:tiny", "--config.model.out_channels=3", *QUICK]
LATENT += [f"--config.first_stage.{name}={value}" for name, value in STAGE.items()]


ok = functools.partial(succeed, devices=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("first_stage")


@pytest.fixture(scope="module")
def first_stage(folder):
    ok("--config=configs/vq_f4.py:tiny", f"--workdir={folder / 'vq'}", *QUICK)
    return folder / "vq"


@pytest.fixture(scope="module")
def latent_run(folder, first_stage):
    weights = f"--config.first_stage.weights={first_stage}"
    ok(*LATENT, weights, f"--workdir={folder / 'ldm'}")
    return folder / "ldm"


def test_it_draws_images_that_differ(folder, latent_run):
    out = folder / "drawn"
    ok("sample", f"--workdir={latent_run}", "--prompt=heart", "--n=2", f"--out={out}")
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))])
    assert images.shape == (2, 32, 32, 3) and (images[0] != images[1]).any()


def test_training_from_a_cache_is_training_online(folder, first_stage, latent_run):
    cached = folder / "cached"
    ok(*LATENT, f"--config.first_stage.weights={first_stage}", f"--workdir={cached}",
       f"--config.latent_cache.folder={folder / 'latents'}",
       "--config.latent_cache.dtype=float32")  # fmt: skip
    ours, theirs = (load_params(run / "checkpoints", ema=False) for run in (cached, latent_run))
    name = ours["network"]["out_2"]["kernel"]
    np.testing.assert_allclose(name, theirs["network"]["out_2"]["kernel"], atol=1e-5)
    assert np.abs(name).max() > 1e-3


def test_a_run_becomes_a_file_and_the_file_a_run(folder, first_stage):
    file, again = folder / "vq.safetensors", folder / "again.safetensors"
    ok("convert", f"--from={first_stage}", f"--to={file}")
    config = ["--config=configs/vq_f4.py:tiny", "--config.perceptual.weights=None"]
    ok("convert", f"--from={file}", *config, f"--to={folder / 'run'}", "--format=run")
    ok("convert", f"--from={folder / 'run'}", f"--to={again}")
    assert file.read_bytes() == again.read_bytes()
    ok("convert", f"--from={first_stage}", f"--to={folder / 'vae'}", "--format=diffusers")
    output = ok(*config, *QUICK, f"--workdir={folder / 'on'}",
                f"--config.train.ckpt_path={file}", "--config.train.num_steps=1")  # fmt: skip
    assert "0 parts not loaded" in output
