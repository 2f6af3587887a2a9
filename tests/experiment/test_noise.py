"""The sections of noise: defaults, discrete and continuous, and what each sampler may visit."""

import numpy as np
import pytest

from diffusion_jax.diffusion.preconditioning import nearest
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.noise import build_noise

SD = dict(name="linear", linear_start=0.00085, linear_end=0.012, parameterization="eps")


def test_a_schedule_alone_is_a_discrete_denoiser_of_its_parameterization():
    noise = build_noise(SD, None, None)
    assert noise.on_timesteps and set(noise.constants()) == {"schedule", "sigmas"}
    np.testing.assert_allclose(np.asarray(noise.sigmas)[[0, -1]], [0.0291672, 14.614641], rtol=1e-5)
    np.testing.assert_allclose(noise.grid(4), [14.614641, 4.081729, 1.612886, 0.693205, 0], 1e-5)
    # The network is told the index in the table: the timestep.
    assert nearest(noise.sigmas, noise.sigmas).tolist() == list(range(1000))
    assert noise.natural_weighting == {"name": "eps"}


def test_a_continuous_denoiser_has_no_table_and_edms_grid():
    section = dict(name="continuous", scaling=dict(name="edm", sigma_data=0.4))
    noise = build_noise(dict(name="linear"), section, None)
    assert not noise.on_timesteps and noise.sigmas is None and "sigmas" not in noise.constants()
    np.testing.assert_allclose(noise.grid(5), [80, 17.52783, 2.515219, 0.169753, 0.002, 0], 1e-5)
    assert noise.natural_weighting == {"name": "edm", "sigma_data": 0.4}


def test_a_table_of_its_own_and_a_grid_of_its_own():
    table = dict(name="edm", num_idx=100, sigma_max=20.0)
    section = dict(name="discrete", scaling=dict(name="edm"), discretization=table)
    noise = build_noise(SD, section, dict(name="karras", sigma_max=10.0))
    assert not noise.on_timesteps and len(noise.sigmas) == 100
    assert noise.grid(3)[0] == pytest.approx(10.0) and len(noise.grid(3)) == 4
    on_schedule = build_noise(SD, dict(name="discrete"), dict(name="schedule"))
    assert on_schedule.on_timesteps and on_schedule.grid(1)[0] == pytest.approx(14.614641, 1e-5)


def test_what_is_denoised_around_a_picture_is_not_what_timestep_samplers_know():
    assert not build_noise(SD, dict(name="discrete", around="concat"), None).on_timesteps


@pytest.mark.parametrize(
    ("denoiser", "grid", "message"),
    [
        (dict(name="discrete", around="frame"), None, r"config\.denoiser\.around = 'frame'"),
        (
            dict(name="discret"),
            None,
            r"config\.denoiser\.name = 'discret' is unknown; did you mean",
        ),
        (
            dict(name="discrete", scalings={}),
            None,
            r"config\.denoiser\.scalings = {} is not an option; did you mean 'scaling'",
        ),
        (
            dict(name="discrete", scaling=dict(name="edm", sigma=1.0)),
            None,
            r"config\.denoiser\.scaling\.sigma = 1\.0 is not an option",
        ),
        (
            dict(name="continuous", discretization=dict(name="edm")),
            None,
            r"config\.denoiser\.discretization is the table of a discrete denoiser",
        ),
        (None, dict(name="karas"), r"config\.discretization\.name = 'karas' is unknown"),
        (None, dict(name="schedule", rho=7.0), r"config\.discretization\.rho = 7\.0 is not an opt"),
    ],
)
def test_mistakes_are_told(denoiser, grid, message):
    with pytest.raises(ConfigError, match=message):
        build_noise(SD, denoiser, grid)
