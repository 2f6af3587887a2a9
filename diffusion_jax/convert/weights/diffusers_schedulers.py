"""The scheduler configs from which diffusers builds its samplers."""

import numpy as np

from diffusion_jax.convert.weights.claims import SCHEDULES
from diffusion_jax.convert.weights.diffusers_folder import VERSION, Config


def scheduler_config(
    *,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    schedule: str = "linear",
    prediction_type: str = "epsilon",
    num_timesteps: int = 1000,
    betas: np.ndarray | None = None,
    zero_snr: bool = False,
) -> Config:
    """Describe a noise schedule as the config of diffusers' DDIMScheduler.

    schedule: a name of ours whose betas diffusers knows: "linear" (diffusers' "scaled_linear"),
    "sqrt_linear" (its "linear") or "squaredcos_cap_v2". betas: all of them, for any other schedule.
    prediction_type: "epsilon", "v_prediction" or "sample". zero_snr: the last timestep is noise
    alone, and has to be visited. Raises ValueError for another schedule without betas.
    """
    names = {ours: theirs for theirs, ours in SCHEDULES.items()}
    if betas is None and schedule not in names:
        raise ValueError(
            f"schedule {schedule!r} is unknown to diffusers; it has {', '.join(names)}"
        )
    config: Config = {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": num_timesteps,
        "prediction_type": prediction_type,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero_snr else "leading",
    }
    if betas is not None:
        return config | {"trained_betas": betas.tolist()}
    own = {"beta_start": beta_start, "beta_end": beta_end, "beta_schedule": names[schedule]}
    return config | own | {"rescale_betas_zero_snr": zero_snr}


def edm_scheduler_config(
    prediction: str, *, sigma_min: float, sigma_max: float, sigma_data: float
) -> Config:
    """Describe a continuous denoiser as the config of diffusers' EDMEulerScheduler.

    prediction: "edm" or "v_edm", which is diffusers' v_prediction with sigma_data = 1.
    """
    is_v = prediction == "v_edm"
    return {
        "_class_name": "EDMEulerScheduler",
        "_diffusers_version": VERSION,
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "sigma_data": 1.0 if is_v else sigma_data,
        "prediction_type": "v_prediction" if is_v else "epsilon",
    }


def flow_scheduler_config(shift: float) -> Config:
    """Describe flow matching as the config of diffusers' FlowMatchEulerDiscreteScheduler."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": 1000,
        "shift": shift,
    }
