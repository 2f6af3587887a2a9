"""Guiders that need more than an unconditional prediction, on Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.experiment import guiders
from diffusion_jax.experiment.config.as_json import to_data, write_json
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import build_noise
from diffusion_jax.experiment.sampling import build_sample_fn
from diffusion_jax.models.conditioning.embedders import class_label
from diffusion_jax.train.checkpoints.saving import open_checkpoints

SCHEDULE = dict(name="linear", linear_start=0.00085, linear_end=0.012, num_timesteps=1000)
NOISE = build_noise(SCHEDULE, None, None)
ABAR = NOISE.schedule.alphas_cumprod
MESH = make_mesh(devices=jax.devices()[:1])
KEYS = jax.random.split(jax.random.key(0), 2)
LABELS = {"label": np.array([1, 4], np.int32)}


class Gaussian(Network):
    """The exact network of pixels N(label / 10, std^2), where the null class is 9: eps."""

    def init(self, key):
        return {"network": {"std": jnp.float32(0.3)}, "conditioner": {}}

    def apply(self, params, x, t, conditioning, dropout_key=None):
        mean = (conditioning["vector"] / 10.0 if conditioning else jnp.zeros(len(x))).reshape(
            -1, 1, 1, 1
        )
        abar, std = ABAR[t][:, None, None, None], params["network"]["std"]
        share = jnp.sqrt(1.0 - abar) / (abar * std**2 + 1.0 - abar)
        return share * (x - jnp.sqrt(abar) * mean)

    def size_multiple(self):
        return 1


CLASSES = Gaussian(None, {"label": class_label(num_classes=9, ucg_rate=0.1)}, "adm", (2, 2, 1))
NO_CLASSES = Gaussian(None, {}, "none", (2, 2, 1))


def draw(sampler, guidance, network, std=0.3, inputs=LABELS, **options):
    sample_fn, _, _ = build_sample_fn(network, NOISE, sampler, guidance, MESH)
    params = {"network": {"std": jnp.float32(std)}, "conditioner": {}}
    frozen = NOISE.constants() | {"conditioner": {}, "first_stage": {}}
    noise = jnp.ones((2, 2, 2, 1)) * jnp.array([1.0, -0.5])[:, None, None, None]
    return np.asarray(sample_fn(params, frozen, inputs, KEYS, noise=noise, **options).x), noise


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_cfgpp_follows_the_algorithm_of_the_paper(name):
    found, noise = draw({"name": name}, {"name": "cfgpp", "scale": 0.6}, CLASSES, num_steps=8)
    if name == "euler":
        sigmas = NOISE.grid(8)
        x = np.asarray(noise, np.float64) * np.sqrt(1.0 + sigmas[0] ** 2)
    else:
        t = np.arange(0, 1000, 125)[::-1] + 1
        abar = np.asarray(ABAR, np.float64)
        ends = np.append(abar[t], abar[0])
        sigmas = np.sqrt((1.0 - ends) / ends)
        x = np.asarray(noise, np.float64) * np.sqrt(1.0 + sigmas[0] ** 2)
    means = np.array([0.1, 0.4]).reshape(-1, 1, 1, 1)
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        share = 0.09 / (0.09 + sigma**2)
        with_, without = (mean + share * (x - mean) for mean in (means, 0.9))
        x = without + 0.6 * (with_ - without) + after / sigma * (x - without)
    x = x if name == "euler" else x * np.sqrt(ends[-1])
    np.testing.assert_allclose(found, x, rtol=2e-3, atol=2e-3)


@pytest.fixture
def weaker(workdir, monkeypatch):
    """A run whose only parameter is the deviation of the data that it has learned, 0.5."""
    workdir.mkdir()
    config = load_config("configs/mnist.py:tiny")
    config.schedule = SCHEDULE
    write_json(workdir / "config.json", {"config": to_data(config)})
    checkpoints = open_checkpoints(workdir / "checkpoints")
    params = {"network": {"std": jnp.float32(0.5)}}
    checkpoints.save(7, {"params": params, "opt_state": {}}, {})
    checkpoints.close()
    monkeypatch.setattr(guiders, "build_network", lambda *given, **options: NO_CLASSES)
    return workdir


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_autoguidance_reads_a_run_and_leads_away_from_it(weaker, scale):
    """Euler's steps between Gaussians of deviations 0.3 and 0.5, guided by the paper's formula."""
    guidance = {"name": "autoguidance", "path": str(weaker), "ema": False, "scale": scale}
    found, noise = draw({"name": "euler"}, guidance, NO_CLASSES, inputs={}, num_steps=8)
    sigmas = NOISE.grid(8)
    x = np.asarray(noise, np.float64) * np.sqrt(1.0 + sigmas[0] ** 2)
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        own, other = (std**2 / (std**2 + sigma**2) * x for std in (0.3, 0.5))
        guided = other + scale * (own - other)
        x = guided + after / sigma * (x - guided)
    np.testing.assert_allclose(found, x, rtol=2e-3, atol=2e-3)


def test_perturbed_attention_needs_no_classes_and_a_middle():
    experiment = built("configs/mnist.py:tiny")
    network = experiment.network
    assert guiders.guides({"name": "perturbed_attention"}, network._replace(embedders={}))
    assert not guiders.guides({"name": "cfg"}, network._replace(embedders={}))
    with pytest.raises(ConfigError, match="needs a UNet of images with self-attention in its mid"):
        draw({"name": "euler"}, {"name": "perturbed_attention", "scale": 2.0}, CLASSES)


@pytest.mark.parametrize(
    ("sampler", "guidance", "message"),
    [
        (
            {"name": "heun"},
            {"name": "cfgpp", "scale": 0.5},
            "cfgpp' changes a step of Euler's method or of DDIM",
        ),
        (
            {"name": "ddim"},
            {"name": "cfgpp", "scale": 3.0},
            "scale = 3.0 should be between 0 and 1",
        ),
        (
            {"name": "ddim", "clip_denoised": True},
            {"name": "cfgpp", "scale": 0.5},
            "clip_denoised = True should be False",
        ),
        ({"name": "ddim"}, {"name": "autoguidance", "scale": 2.0}, "path is missing"),
        (
            {"name": "ddim"},
            {"name": "autoguidance", "scale": 2.0, "path": "/nowhere"},
            "path = '/nowhere' should be a run of a weaker model",
        ),
    ],
)
def test_what_does_not_fit_is_said(sampler, guidance, message):
    with pytest.raises(ConfigError, match=message):
        draw(sampler, guidance, CLASSES)


def test_a_weaker_model_of_another_schedule_needs_a_sampler_of_levels(weaker):
    config = load_config("configs/mnist.py:tiny")
    write_json(weaker / "config.json", {"config": to_data(config)})
    guidance = {"name": "autoguidance", "scale": 2.0, "path": str(weaker)}
    with pytest.raises(ConfigError, match="another schedule or parameterization"):
        draw({"name": "ddim"}, guidance, NO_CLASSES)
