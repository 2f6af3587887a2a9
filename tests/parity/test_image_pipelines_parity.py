"""Models that read images, as folders of diffusers: its pipelines draw the same picture."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib

import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.pipeline import Pipeline

pytestmark = pytest.mark.parity
PROMPTS = ["a red fox", "Größe, 12 don't"]
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
HOLE = np.zeros((2, 32, 32, 1), np.float32)
HOLE[0, 7:21, 5:30], HOLE[1, :, 11:] = 1.0, 1.0
RELEASED = [
    "--config.first_stage.weights=None",
    "--config.conditioning.embedders.text.weights=None",
]


def both(variant, tmp_path):
    """Our pipeline, the folder that we wrote of it, diffusers' pipeline, and noise for both."""
    torch, diffusers = (pytest.importorskip(package) for package in ("torch", "diffusers"))
    path = f"configs/sd15.py:{variant}"
    experiment, weights = built(path), trained(path)
    folder = tmp_path / "folder"
    experiment.task.export_folder(weights, folder)
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    noise = RNG.standard_normal((2, *experiment.network.image_shape)).astype(np.float32)
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    ours = Pipeline(experiment, weights.params, weights.frozen)
    return ours, folder, theirs, noise, latents


def as_torch(images):
    """Images uint8 -> in [-1, 1], as diffusers takes them, by the package that it is made with."""
    torch = pytest.importorskip("torch")
    return torch.from_numpy(np.moveaxis(images / 127.5 - 1.0, -1, 1).astype(np.float32))


def test_an_inpainting_model_completes_what_diffusers_completes(tmp_path, monkeypatch):
    ours, folder, theirs, noise, latents = both("inpaint_tiny", tmp_path)
    assert type(theirs).__name__ == "StableDiffusionInpaintPipeline"
    module = importlib.import_module(type(theirs).__module__)
    # diffusers draws the latents of the masked image from their posterior, and we take its mode.
    monkeypatch.setattr(module, "retrieve_latents", lambda out, **_: out.latent_dist.mode())
    holes = pytest.importorskip("torch").from_numpy(np.moveaxis(HOLE, -1, 1).copy())
    options = dict(num_inference_steps=4, guidance_scale=5.0, height=32, width=32)
    given = dict(image=as_torch(IMAGE), mask_image=holes, latents=latents)
    found = theirs(PROMPTS, output_type="np", **given, **options).images
    drawn = ours(
        PROMPTS, image=IMAGE, mask=1.0 - HOLE, noise=noise, num_steps=4, guidance_scale=5.0
    )
    redrawn = np.broadcast_to(HOLE == 1.0, drawn.shape)
    assert np.abs(drawn / 255.0 - found)[redrawn].max() < 2.5 / 255.0
    np.testing.assert_array_equal(drawn[~redrawn], IMAGE[~redrawn])
    # Both the mask and the image are read.
    for other in (dict(mask=1.0 - HOLE[::-1]), dict(image=IMAGE[::-1])):
        options = dict(image=IMAGE, mask=1.0 - HOLE, noise=noise, num_steps=4, guidance_scale=5.0)
        changed = ours(PROMPTS, **(options | other))
        assert np.abs(changed / 255.0 - found)[redrawn].max() > 5.0 / 255.0
    again = Pipeline.from_checkpoint(folder, "configs/sd15.py:inpaint_tiny", overrides=RELEASED)
    same = again(
        PROMPTS, image=IMAGE, mask=1.0 - HOLE, noise=noise, num_steps=4, guidance_scale=5.0
    )
    np.testing.assert_array_equal(same, drawn)


def test_an_edit_model_edits_what_diffusers_edits(tmp_path):
    ours, folder, theirs, noise, latents = both("edit_tiny", tmp_path)
    assert type(theirs).__name__ == "StableDiffusionInstructPix2PixPipeline"
    scales = dict(guidance_scale=4.0, image_guidance_scale=1.7)
    found = theirs(
        PROMPTS,
        image=as_torch(IMAGE),
        latents=latents,
        num_inference_steps=4,
        output_type="np",
        **scales,
    ).images
    options = dict(image=IMAGE, noise=noise, num_steps=4) | scales
    drawn = ours(PROMPTS, **options)
    assert drawn.shape == found.shape and found.std() > 0.01
    assert np.abs(drawn / 255.0 - found).max() < 2.5 / 255.0
    for other in (
        dict(image=IMAGE[::-1]),
        dict(image_guidance_scale=1.0),
        dict(guidance_scale=1.0),
    ):
        assert np.abs(ours(PROMPTS, **(options | other)) / 255.0 - found).max() > 5.0 / 255.0
    again = Pipeline.from_checkpoint(folder, "configs/sd15.py:edit_tiny", overrides=RELEASED)
    np.testing.assert_array_equal(again(PROMPTS, **options), drawn)
