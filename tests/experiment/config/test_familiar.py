"""The names of other tools: what is answered is a config that can be built."""

import pytest

from diffusion_jax.diffusion.samplers.sigmas import DISCRETIZATIONS as GRIDS
from diffusion_jax.diffusion.samplers.timesteps import DISCRETIZATIONS as SPACINGS
from diffusion_jax.experiment.config import familiar
from diffusion_jax.experiment.config.binding import parameters_of
from diffusion_jax.experiment.config.familiar import overrides_of
from diffusion_jax.experiment.sampling import SAMPLERS


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("DPM++ 2M Karras", "sampler.name=dpmpp_2m discretization.name=karras"),
        ("dpmpp_2m_karras", "sampler.name=dpmpp_2m discretization.name=karras"),
        ("DPM++ 2M SDE Heun", "sampler.name=dpmpp_2m_sde sampler.solver_type=heun"),
        ("dpm++ 3m sde exponential", "sampler.name=dpmpp_3m_sde discretization.name=exponential"),
        ("DPM++ SDE", "sampler.name=dpmpp_sde"),
        ("DPM++ 2S a Karras", "sampler.name=dpmpp_2s_ancestral discretization.name=karras"),
        ("Euler a", "sampler.name=euler_ancestral"),
        ("k_euler_a", "sampler.name=euler_ancestral"),
        ("Euler simple", "sampler.name=euler"),
        ("EulerAncestralDiscreteScheduler", "sampler.name=euler_ancestral"),
        ("UniPCMultistepScheduler", "sampler.name=unipc"),
        ("PNDMScheduler", "sampler.name=plms"),
        ("LCM", "sampler.name=lcm"),
        ("TCDScheduler", "sampler.name=tcd"),
        ("Euler SGM Uniform", "sampler.name=euler"),
        ("dpm++ 2m sgm_uniform", "sampler.name=dpmpp_2m"),
        (
            "SDXL-Turbo",
            "sampler.name=euler_ancestral sampler.num_steps=1 "
            "discretization.name=schedule guidance.name=none",
        ),
        (
            "lightning",
            "sampler.name=euler sampler.num_steps=4 "
            "discretization.name=schedule guidance.name=none",
        ),
        ("DPMSolverSampler", "sampler.name=dpm_solver"),
        ("ddim uniform", "sampler.name=ddim sampler.discretize=uniform"),
        ("DDIM trailing", "sampler.name=ddim sampler.discretize=trailing"),
    ],
)
def test_familiar_names(name, here):
    assert overrides_of(name) == [f"--config.{option}" for option in here.split()]


@pytest.mark.parametrize("name", ["", "karras", "ddim karras", "lcm trailing", "euler b", "dpm2"])
def test_what_nobody_knows_is_not_guessed(name):
    assert overrides_of(name) is None


def test_every_answer_names_what_is_there():
    tables = (familiar._LEVELS, familiar._TIMESTEPS, familiar._FIXED_TIMESTEPS)
    for words in {word for table in tables for word in table.values()}:
        sampler, *options = words.split()
        assert {option.split("=")[0] for option in options} <= set(parameters_of(SAMPLERS[sampler]))
    for recipe in familiar._RECIPES.values():
        assert recipe.split()[0].removeprefix("sampler.name=") in SAMPLERS
    for (option,) in filter(None, familiar._GRIDS.values()):
        assert option.removeprefix("--config.discretization.name=") in GRIDS
    assert set(familiar._SPACINGS) == set(SPACINGS)
    for sampler in familiar._TIMESTEPS.values():
        assert "discretize" in parameters_of(SAMPLERS[sampler])
