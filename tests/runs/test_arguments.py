"""What a step would be given is what training does give it, with and without a latent cache."""

import jax
import numpy as np
import pytest

from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.plan import find_topology
from diffusion_jax.plan.compiling import build
from diffusion_jax.runs.arguments import arguments_of

SDXL = "configs/sdxl.py:tiny"


@pytest.mark.slow
def test_a_latent_cache_gives_moments_and_what_text_encoders_give():
    config = load_config(SDXL, [])
    with config.unlocked():
        config.data.batches.crop = "center"
        config.latent_cache = {"folder": "never/opened"}
    built = build(config, find_topology("cpu:2"), 1)
    state, batch, frozen = arguments_of(built)
    shapes = {name: leaf.shape for name, leaf in batch.items()}
    assert shapes["moments"] == (2, 16, 16, 8) and "image" not in shapes
    assert shapes["cached/clip/0"] == (2, 77, 32)
    # Of the second encoder the sequence and the pooled projection.
    assert (shapes["cached/open_clip/0"], shapes["cached/open_clip/1"]) == ((2, 77, 32), (2, 32))
    assert batch["moments"].dtype == np.float32 and batch["cached/clip/0"].dtype == np.float16
    assert not any("token" in name for name in shapes)
    assert {name: leaf.shape for name, leaf in frozen["null_outputs"].items()} == {
        name: shape[1:] for name, shape in shapes.items() if name.startswith("cached/")
    }
    new, metrics = jax.eval_shape(built.train_step, state, batch, frozen)
    assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics


def test_the_batch_is_split_and_of_the_types_that_training_reads():
    built = build(load_config(SDXL, []), find_topology("cpu:2"), 3)
    _, batch, _ = arguments_of(built)
    names = ["image", *built.task.example_inputs(1)]
    assert sorted(batch) == sorted(names)
    host = {"image": np.zeros((6, *built.data.image_shape), np.float32)}
    host |= {name: np.asarray(value) for name, value in built.task.example_inputs(6).items()}
    real = built.to_devices(host)
    for name, leaf in batch.items():
        assert (leaf.shape, leaf.dtype) == (real[name].shape, real[name].dtype), name
        assert leaf.sharding == real[name].sharding


@pytest.mark.parametrize("place", [0, -1])
def test_a_latent_cache_of_videos_gives_the_frame_that_conditions_them(place):
    """A plan reads its arguments from here, and a run on a GPU or TPU for its FLOPs."""
    config = load_config("configs/svd.py:tiny", [])
    with config.unlocked():
        config.data.batches.crop = "center"
        config.latent_cache = {"folder": "never/opened"}
        config.conditioning.frame_fit = "object" if place == -1 else "cover"
    built = build(config, find_topology("cpu:2"), 1)
    state, batch, frozen = arguments_of(built)
    shapes = {name: leaf.shape for name, leaf in batch.items()}
    assert shapes["moments"] == (2, 4, 16, 16, 8) and "image" not in shapes
    assert shapes["cond_frames_without_noise"] == (2, 32, 32, 3)
    assert batch["cond_frames_without_noise"].dtype == np.float32
    new, metrics = jax.eval_shape(built.train_step, state, batch, frozen)
    assert jax.tree.structure(new) == jax.tree.structure(state) and "loss" in metrics
