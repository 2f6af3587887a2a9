"""The sampler of a config as a scheduler of diffusers."""

import pytest
from support.experiments import built

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.diffusers_scheduler import diffusers_scheduler

ZERO = ("--config.schedule.rescale_zero_snr=True", "--config.schedule.parameterization=v")


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (None, {"_class_name": "DDIMScheduler", "timestep_spacing": "leading",
                "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}),
        ({"name": "ddim", "discretize": "trailing", "clip_denoised": True},
         {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "steps_offset": 1,
          "set_alpha_to_one": True, "clip_sample": True}),
        ({"name": "euler"}, {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1,
                             "timestep_spacing": "trailing"}),
        ({"name": "plms"}, {"_class_name": "PNDMScheduler", "skip_prk_steps": True,
                            "timestep_spacing": "leading"}),
        ({"name": "dpmpp_3m_sde"}, {"_class_name": "DPMSolverMultistepScheduler",
                                    "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ],
)  # fmt: skip
def test_the_sampler_decides_the_scheduler(sampler, expected):
    noise = built("configs/sd15.py:tiny").drawing.noise
    config, words = diffusers_scheduler(noise, sampler)
    assert {key: config[key] for key in expected} == expected
    assert config["beta_schedule"] == "scaled_linear" and config["beta_end"] == 0.012
    assert f"`{'ddim' if sampler is None else sampler['name']}`" in words


def test_what_diffusers_lacks_is_said():
    noise = built("configs/sd15.py:tiny").drawing.noise
    config, words = diffusers_scheduler(noise, {"name": "restart"})
    assert config["_class_name"] == "EulerDiscreteScheduler" and "stands in" in words
    config, words = diffusers_scheduler(
        built("configs/sd15.py:tiny", *ZERO).drawing.noise, {"name": "lms"}
    )
    assert config["_class_name"] == "DDIMScheduler" and config["rescale_betas_zero_snr"]
    assert config["timestep_spacing"] == "trailing" and "stands in" in words


def test_a_model_of_videos_that_diffusers_cannot_draw_with_is_refused():
    noise = built("configs/moving_digits.py:tiny").drawing.noise
    assert noise.around == "concat"
    with pytest.raises(
        ConfigError, match="no counterpart .* needs the scaling v_edm without aroun"
    ):
        diffusers_scheduler(noise, is_video=True)
