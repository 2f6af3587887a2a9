"""An exported folder runs in diffusers' pipeline of Stable Video Diffusion and draws our videos."""

import os

# Before a Hugging Face package starts: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.tiny_videos import tiny

from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.experiment.files.export import export_diffusers
from diffusion_jax.experiment.network.frames import FRAME, NOISE_LEVEL
from diffusion_jax.experiment.sampling import build_sample_fn
from diffusion_jax.randomness import sample_keys, seed_key

pytestmark = pytest.mark.parity
STEPS, FPS, BUCKET, SCALE = 3, 7, 90, 2.5
GUIDER = {"name": "linear", "scale": SCALE, "min_scale": 1.0}


def test_diffusers_draws_what_we_draw(tmp_path):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    network, noise, trained = tiny()
    export_diffusers(network, noise, trained, tmp_path / "x")
    pipeline = diffusers.StableVideoDiffusionPipeline.from_pretrained(tmp_path / "x")
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    for name, layer in pipeline.unet.named_modules():
        # They take 1e-6 in a part of the blocks, where the original has 1e-5.
        if isinstance(layer, torch.nn.GroupNorm):
            layer.eps = 1e-6 if ".attentions." in name else 1e-5
    stream = np.random.default_rng(0)
    start = stream.standard_normal((1, 2, 8, 8, 4)).astype(np.float32)
    picture = stream.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    options = {"fps": FPS, "motion_bucket_id": BUCKET, "noise_aug_strength": 0.0}
    theirs = {
        kind: pipeline(
            Image.fromarray(picture),
            height=16,
            width=16,
            num_inference_steps=STEPS,
            min_guidance_scale=1.0,
            max_guidance_scale=SCALE,
            latents=torch.from_numpy(np.moveaxis(start, -1, 2).copy()),
            output_type=kind,
            **options,
        ).frames
        for kind in ("latent", "np")
    }

    mesh = make_mesh(devices=jax.devices()[:1])
    sample_fn, _, _ = build_sample_fn(network, noise, {"name": "euler"}, GUIDER, mesh)
    inputs = {
        FRAME: picture[None].astype(np.float32) / 127.5 - 1.0,
        "fps_id": np.full((1, 1), FPS - 1, np.float32),
        "motion_bucket_id": np.full((1, 1), BUCKET, np.float32),
        NOISE_LEVEL: np.zeros((1, 1), np.float32),
    }
    keys = sample_keys(seed_key(0), jnp.arange(1))
    ours = {
        kind: sample_fn(
            trained.params,
            trained.frozen | noise.constants(),
            inputs,
            keys,
            num_steps=STEPS,
            noise=start,
            decode=kind == "np",
        ).x
        for kind in ("latent", "np")
    }
    latents = np.moveaxis(theirs["latent"].numpy(), 2, -1)
    error = np.abs(ours["latent"] - latents).max() / np.abs(latents).max()
    pixels = np.clip(np.asarray(ours["np"]) / 2.0 + 0.5, 0.0, 1.0)
    worst = np.abs(pixels - np.stack(theirs["np"])).max()
    print(f"latents {error:.1e}, pixels {worst:.1e}, spread {pixels.std():.2f}")
    assert error < 1e-3 and worst < 2e-3 and pixels.std() > 0.02
