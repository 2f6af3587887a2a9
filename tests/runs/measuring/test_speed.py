"""FLOPs of a step, whatever the config does to save memory, and when they are counted."""

import importlib.util
from pathlib import Path

import jax
import ml_collections
import pytest

import diffusion_jax.experiment as build
from diffusion_jax.devices.chips import find_chip
from diffusion_jax.devices.flops import count_flops
from diffusion_jax.runs.measuring import speed as module
from diffusion_jax.runs.measuring.speed import build_speed, model_flops
from diffusion_jax.train.hooks.scalars import Speed

CONFIGS = Path(__file__).parents[3] / "configs"


def tiny(name, **model):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    config = file.get_config("tiny")
    config.unlock()
    config.model.update(model)
    return build.make_experiment(config, devices=jax.devices()[:1])


def step_flops(experiment):
    return count_flops(
        experiment.train_step,
        experiment.abstract_state(),
        experiment.abstract_batch(),
        experiment.abstract_frozen(),
    )


@pytest.mark.slow
def test_what_remat_computes_again_is_no_work_of_the_model():
    plain, again = tiny("mnist"), tiny("mnist", remat=True)
    assert model_flops(plain) == model_flops(again) == step_flops(plain) < step_flops(again)


@pytest.mark.slow
def test_a_step_is_three_forward_passes_of_the_network():
    experiment = tiny("mnist")
    batch, network = experiment.abstract_batch(), experiment.network
    state, frozen = experiment.abstract_state(), experiment.abstract_frozen()

    def forward(params, frozen, batch):
        conditioning = network.embed(params, frozen, batch)
        return network.apply(params, batch["image"], batch["label"], conditioning)

    once = count_flops(forward, state.params, frozen, batch)
    # All but the gradient of the first convolution's input, which nobody needs.
    assert model_flops(experiment) == pytest.approx(3 * once, rel=0.02)


@pytest.mark.slow
def test_what_a_latent_cache_has_is_no_work_of_the_step():
    online = tiny("emoji_ldm")
    sections = {**online.sections, "latent_cache": {"folder": "never/opened"}}
    cached = build.make_experiment(ml_collections.ConfigDict(sections), devices=jax.devices()[:1])
    stage = online.network.first_stage
    assert stage is not None
    arguments = online.abstract_frozen()["first_stage"], online.abstract_batch()["image"]
    assert model_flops(online) - model_flops(cached) == count_flops(stage.moments, *arguments)


def test_a_first_stage_counts_its_discriminator():
    assert model_flops(tiny("emoji_vae")) > 0


def test_they_are_counted_where_the_peak_is_known(monkeypatch):
    experiment = tiny("mnist")
    images = experiment.training.batch_size
    assert build_speed(experiment) == Speed(images, 1)  # a CPU
    monkeypatch.setattr(module, "find_chip", lambda kind: find_chip("TPU v5p"))
    monkeypatch.setattr(module, "model_flops", lambda experiment: 12)
    assert build_speed(experiment) == Speed(images, 1, 12, 459e12)
