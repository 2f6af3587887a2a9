"""A run as a folder of diffusers: its pipelines load the whole and draw the same picture."""

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
SCALE = 5.0


@pytest.mark.parametrize(
    ("name", "pipeline", "overrides"),
    [
        ("sdxl", "StableDiffusionXLPipeline", []),
        ("sd15", "StableDiffusionPipeline", []),
        ("sd21", "StableDiffusionPipeline", []),
        (
            "sd15",
            "StableDiffusionPipeline",
            ["--config.sampler.name=ddim", "--config.sampler.discretize=trailing"],
        ),
        (
            "sd15",
            "LatentConsistencyModelPipeline",
            [
                "--config.model.time_cond_proj_dim=16",
                "--config.sampler.name=lcm",
                "--config.guidance.name=embedded",
            ],
        ),
    ],
)
def test_a_whole_pipeline_draws_what_ours_draws(name, pipeline, overrides, tmp_path, monkeypatch):
    torch, diffusers = (pytest.importorskip(package) for package in ("torch", "diffusers"))
    path = f"configs/{name}.py:tiny"
    experiment, weights = built(path, *overrides), trained(path, *overrides)
    folder = tmp_path / "folder"
    experiment.task.export_folder(weights, folder)
    theirs = getattr(diffusers, pipeline).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert "from_pretrained" in (folder / "README.md").read_text()

    network = experiment.network
    ours = Pipeline(experiment, weights.params, weights.frozen)
    noise = np.random.default_rng(0).standard_normal((2, *network.image_shape)).astype(np.float32)
    height, width, _ = experiment.data.image_shape
    latents = torch.from_numpy(np.moveaxis(noise, -1, 1).copy())
    sigma = theirs.scheduler.init_noise_sigma
    if sigma != 1.0:  # diffusers begins at sigma, sgm and this program at sqrt(1 + sigma^2)
        theirs.scheduler.set_timesteps(4)
        sigma = float(theirs.scheduler.init_noise_sigma)
        latents = latents * np.sqrt(1.0 + sigma**2).astype(np.float32) / sigma
    options = dict(num_inference_steps=4, guidance_scale=SCALE, height=height, width=width)
    steps = np.random.default_rng(1).standard_normal((2, 4, *network.image_shape), np.float32)
    own = {}
    if pipeline.startswith("LatentConsistency"):
        module, fresh = importlib.import_module(type(theirs.scheduler).__module__), iter(range(4))
        of_step = lambda i: torch.from_numpy(np.moveaxis(steps[:, i], -1, 1).copy())
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: of_step(next(fresh)))
        own = {"step_noise": steps}
    found = theirs(PROMPTS, latents=latents, output_type="np", **options).images
    drawn = ours(PROMPTS, noise=noise, num_steps=4, guidance_scale=SCALE, **own)
    assert drawn.shape == found.shape and found.std() > 0.01
    assert np.abs(drawn / 255.0 - found).max() < 2.5 / 255.0
    # The prompt is read, and the same tokens are made of it.
    other = ours([PROMPTS[1], PROMPTS[0]], noise=noise, num_steps=4, guidance_scale=SCALE, **own)
    assert np.abs(other / 255.0 - found).max() > 5.0 / 255.0
    for part in ("tokenizer", "tokenizer_2"):
        if hasattr(theirs, part):
            tokenizer = getattr(theirs, part)
            ids = tokenizer(PROMPTS, padding="max_length", max_length=77).input_ids
            keys = {e.text.tokens_key for e in network.embedders.values() if e.text is not None}
            made = [network.tokenize[key][1](PROMPTS) for key in sorted(keys)]
            assert any(np.array_equal(ids, own) for own in made)
