"""The loss sections: which go together, and that the two losses agree where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.building import _embedder
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import build_noise
from diffusion_jax.experiment.objective import build_objective

SCHEDULE = dict(name="linear", num_timesteps=100, parameterization="eps")
CONTINUOUS = dict(name="continuous", scaling=dict(name="edm"))


class Half(Network):
    """A network that halves what it sees."""

    def apply(self, params, x, t, conditioning, dropout_key=None):
        return params["scale"] * x


NETWORK = Half(None, {}, "none", (4, 4, 1))
PARAMS = {"scale": jnp.float32(0.5), "conditioner": {}}


def objective(loss, schedule=SCHEDULE, denoiser=None, network=NETWORK, **sections):
    noise = build_noise(schedule, denoiser, None)
    sections = {"loss": loss, "sigma_sampling": None, "weighting": None} | sections
    return noise, build_objective(network, noise, sections, 8)


def value(noise, built, seed=0, scale=0.5):
    params = PARAMS | {"scale": jnp.float32(scale)}
    batch = {
        "image": 0.3 * jax.random.normal(jax.random.key(9), (512, 4, 4, 1)),
        "position": jnp.arange(512, dtype=jnp.int32),
    }
    keys = jax.random.split(jax.random.key(seed), 512)
    frozen = noise.constants() | built.constants | {"conditioner": {}}
    return float(built.loss_fn(params, {}, frozen, batch, keys, train=True)[0])


def test_the_denoisers_loss_is_the_ddpm_loss_with_the_natural_weights():
    ddpm = value(*objective(dict(name="ddpm")))
    denoiser = value(*objective(dict(name="denoiser")))
    np.testing.assert_allclose(denoiser, ddpm, rtol=0.05)  # other timesteps were drawn
    unit = value(*objective(dict(name="denoiser"), weighting=dict(name="unit")))
    assert abs(unit - ddpm) > 0.2 * ddpm


def test_the_default_noise_levels_are_those_of_the_denoiser():
    noise, built = objective(dict(name="denoiser"), denoiser=CONTINUOUS)
    assert "sigmas" not in noise.constants() and np.isfinite(value(noise, built))
    listed = dict(name="discrete", num_idx=10, discretization=dict(name="edm"))
    noise, built = objective(dict(name="denoiser"), denoiser=CONTINUOUS, sigma_sampling=listed)
    assert np.isfinite(value(noise, built))


class Centred(Half):
    """A network of differences to a picture, which is what it is conditioned on."""

    def embed(self, params, frozen, batch, keys=None, **options):
        return {"concat": batch["image"]}


PICTURE = _embedder("picture", dict(name="concat_image", input_key="picture", channels=1))
CENTRED = Centred(None, {"picture": PICTURE}, "concat", (4, 4, 1))
AROUND = CONTINUOUS | {"around": "concat"}


def test_around_its_own_image_nothing_is_left_to_denoise():
    """x - y is the noise alone; F = 0 leaves c_skip of it, whose weighted square is known."""
    made = objective(dict(name="denoiser"), denoiser=AROUND, network=CENTRED)
    nothing = value(*made, scale=0.0)
    # w(sigma) (c_skip sigma)^2 = (sigma_data / sqrt(sigma^2 + sigma_data^2))^2 for edm.
    sigma = np.exp(-1.2 + 1.2 * np.random.default_rng(0).standard_normal(100000))
    np.testing.assert_allclose(nothing, np.mean(0.25 / (sigma**2 + 0.25)), rtol=0.05)


@pytest.mark.parametrize(
    "loss",
    [
        dict(name="ddpm"),
        dict(name="mean_flow"),
        dict(name="consistency", total_steps=10),
        dict(name="experiment.test_objective:make_own_loss"),
    ],
)
def test_a_loss_that_knows_no_differences_refuses_them(loss):
    """It would train the network to draw pictures, and sampling would add the frame to them."""
    with pytest.raises(ConfigError) as error:
        objective(loss, denoiser=AROUND, network=CENTRED)
    assert str(error.value) == (
        "config.denoiser.around = 'concat' needs config.loss.name = 'denoiser', and it is "
        f"{loss['name']!r}"
    )


def make_own_loss(apply, embed, encode, scaling):
    """A maker of a loss of the user's own."""


@pytest.mark.parametrize(
    ("loss", "denoiser", "sections", "message"),
    [
        (
            dict(name="denoiser"),
            AROUND,
            {},
            "config.denoiser.around = 'concat' needs an embedder that gives the network 1 channels",
        ),
        (dict(name="ddpm"), CONTINUOUS, {}, "config.loss.name = 'ddpm' trains on the schedule's"),
        (
            dict(name="ddpm"),
            None,
            dict(weighting=dict(name="v")),
            r"config\.weighting is read with config\.loss\.name = 'denoiser' only",
        ),
        (
            dict(name="denoiser"),
            CONTINUOUS,
            dict(sigma_sampling=dict(name="discrete")),
            r"config\.sigma_sampling\.discretization is missing",
        ),
        (
            dict(name="denoiser"),
            None,
            dict(sigma_sampling=dict(name="lognormal", mean=1.0)),
            r"config\.sigma_sampling\.mean = 1\.0 is not an option",
        ),
        (
            dict(name="denoiser"),
            None,
            dict(weighting=dict(name="min_snr", gama=1.0)),
            r"config\.weighting\.gama = 1\.0 is not an option; did you mean 'gamma'",
        ),
        (dict(name="denoiser", logvar_init=0.0), None, {}, r"config\.loss\.logvar_init = 0\.0 is"),
        (dict(name="mean_flow"), CONTINUOUS, {}, "embeds_duration should be True for config.loss"),
        (
            dict(name="consistency", total_steps=10),
            CONTINUOUS,
            {},
            "needs config.denoiser.name = 'continuous' and config.denoiser.scaling.name = 'cons",
        ),
        (
            dict(name="consistency", total_steps=10, sigma_min=0.01),
            dict(name="continuous", scaling=dict(name="consistency")),
            {},
            "with the same sigma_min as config.loss",
        ),
    ],
)
def test_mistakes_are_told(loss, denoiser, sections, message):
    with pytest.raises(ConfigError, match=message):
        objective(loss, denoiser=denoiser, **sections)
