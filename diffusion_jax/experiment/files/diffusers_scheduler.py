"""The noise levels and the sampler of a config as a scheduler of diffusers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.convert.weights.claims import SCHEDULES
from diffusion_jax.convert.weights.diffusers_schedulers import (
    edm_scheduler_config,
    flow_scheduler_config,
    scheduler_config,
)
from diffusion_jax.convert.weights.diffusers_video import levels_config
from diffusion_jax.diffusion.samplers.sigmas import FLOW_NOISE
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.experiment.config.binding import ConfigError, value_of
from diffusion_jax.experiment.files.claims import alphas_cumprod_of, is_zero_snr, prediction_of
from diffusion_jax.experiment.noise import Noise
from diffusion_jax.experiment.sampling import TIMESTEP_SAMPLERS

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_DPM: dict[str, Any] = {"_class_name": "DPMSolverMultistepScheduler"}
# A sampler -> the scheduler that does its steps, and what its class takes beside the schedule.
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "ddpm": {"_class_name": "DDPMScheduler", "clip_sample": True, "variance_type": "fixed_small"},
    "plms": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "lcm": {"_class_name": "LCMScheduler"},
    "tcd": {"_class_name": "TCDScheduler", "clip_sample": False},
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
    "euler_ancestral": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "dpmpp_2m": _DPM,
    "dpmpp_2m_sde": _DPM | {"algorithm_type": "sde-dpmsolver++"},
    "dpmpp_3m_sde": _DPM | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    "dpm_solver": _DPM | {"algorithm_type": "dpmsolver"},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "deis": {"_class_name": "DEISMultistepScheduler"},
    "lms": {"_class_name": "LMSDiscreteScheduler"},
}
# Options of `lcm` and `tcd` that a scheduler has under these names.
_RENAMED = {
    "original_steps": "original_inference_steps",
    "timestep_scaling": "timestep_scaling",
}
_ENDS_CLEAN = ("leading", "trailing", "linspace")
_SETS_ALPHA = ("DDIMScheduler", "PNDMScheduler", "LCMScheduler")
# Schedulers that can make the last timestep noise alone.
_ZERO_SNR = (
    "DDIMScheduler DDPMScheduler LCMScheduler TCDScheduler EulerDiscreteScheduler "
    "EulerAncestralDiscreteScheduler DPMSolverMultistepScheduler UniPCMultistepScheduler"
).split()


def diffusers_scheduler(
    noise: Noise, sampler: Mapping[str, Any] | None = None, *, is_video: bool = False
) -> tuple[dict[str, Any], str]:
    """Write the scheduler_config.json of a config -> (its content, a sentence about the choice).

    sampler: the section; None is ddim. Where diffusers has no such sampler, another one stands in,
    and the sentence says so.
    Raises ConfigError for noise levels that diffusers cannot be told.
    """
    config = _video_schedule(noise) if is_video else _schedule(noise)
    if config["_class_name"] != "DDIMScheduler":
        return config, f"Its scheduler is {config['_class_name']}."
    section = {"name": "ddim"} if sampler is None else dict(sampler)
    name = section["name"] if "name" in section else "ddim"
    own = _SCHEDULERS[name] if name in _SCHEDULERS else {}
    zero_snr = config["timestep_spacing"] == "trailing"  # as scheduler_config has it
    theirs = own["_class_name"] if own else "EulerDiscreteScheduler"
    if zero_snr and theirs not in _ZERO_SNR:
        theirs, own = "DDIMScheduler", {}
    same = own != {}
    own = {"_class_name": theirs, **own}
    spaced = _spacing(noise, name, section, theirs, zero_snr)
    dropped = {"clip_sample", "set_alpha_to_one", "steps_offset", "timestep_spacing"}
    if theirs not in _ZERO_SNR:
        dropped |= {"rescale_betas_zero_snr"}
    shared = {key: value for key, value in config.items() if key not in dropped}
    own |= {theirs: section[ours] for ours, theirs in _RENAMED.items() if ours in section}
    if "clip_sample" in own and "clip_denoised" in section:
        own["clip_sample"] = bool(section["clip_denoised"])
    words = f"Its scheduler, {theirs}, does the steps of the sampler `{name}`."
    if not same:
        words = f"diffusers has no counterpart of the sampler `{name}`; {theirs} stands in."
    return shared | spaced | own, words


def _spacing(
    noise: Noise, name: str, section: Mapping[str, Any], theirs: str, zero_snr: bool
) -> dict[str, Any]:
    """Say which timesteps are visited: what the option discretize says, else an even grid to T."""
    spacing = "trailing"
    if name in TIMESTEP_SAMPLERS and not zero_snr:
        row = TIMESTEP_SAMPLERS[name]
        spacing = value_of(row, section, "discretize") if name in ("ddim", "ddpm", "plms") else ""
    ends_clean = spacing in _ENDS_CLEAN
    spaced: dict[str, Any] = {"timestep_spacing": spacing if ends_clean else "leading"}
    spaced["steps_offset"] = 0 if spacing == "leading" else 1  # no one else reads it
    if theirs in _SETS_ALPHA:
        spaced["set_alpha_to_one"] = ends_clean
    return spaced


def _video_schedule(noise: Noise) -> dict[str, Any]:
    prediction = prediction_of(noise)
    if prediction != "v_edm":
        raise ConfigError(
            "config.denoiser has no counterpart in diffusers' pipeline of videos, which needs the "
            "scaling v_edm without around; export this model as .safetensors"
        )
    return levels_config(**_levels(noise))


def _levels(noise: Noise) -> dict[str, float]:
    """Find the ends of the noise levels, without the error of the powers that give them."""
    highest, lowest, _ = noise.grid(2)
    ends = {"sigma_min": lowest, "sigma_max": highest}
    return {name: float(f"{level:.6g}") for name, level in ends.items()}


def _schedule(noise: Noise) -> dict[str, Any]:
    """Write the schedule alone, as DDIM's, EDM's or flow matching's scheduler has it."""
    prediction = prediction_of(noise)
    if prediction in ("edm", "v_edm"):
        natural = {"sigma_data": 0.5} | dict(noise.natural_weighting or {})
        return edm_scheduler_config(prediction, **_levels(noise), sigma_data=natural["sigma_data"])
    if prediction == "flow":
        grid = noise.grid(2)
        return flow_scheduler_config(float(grid[1]) if grid[0] == FLOW_NOISE else 1.0)
    if prediction is None or noise.sigmas is None or not noise.quantize_c_noise:
        raise ConfigError(
            "config.denoiser has no counterpart among the schedulers of diffusers; export this "
            "model as .safetensors"
        )
    options, zero_snr = noise.schedule_options, is_zero_snr(noise)
    shared = {
        "prediction_type": _PREDICTIONS[prediction],
        "num_timesteps": len(noise.sigmas),
        "zero_snr": zero_snr,
    }
    given = value_of(make_schedule, options, "given_betas")
    if noise.on_timesteps and given is None and options["name"] in SCHEDULES.values():
        start, end = (value_of(make_schedule, options, f"linear_{end}") for end in ("start", "end"))
        return scheduler_config(beta_start=start, beta_end=end, schedule=options["name"], **shared)
    abar = alphas_cumprod_of(noise)
    if zero_snr:
        abar[-1] = 0.0
    return scheduler_config(betas=1.0 - abar / np.append(1.0, abar[:-1]), **shared)
