"""Samplers as pairs of pure functions (init, step), and the one loop that runs them.

    from diffusion_jax.diffusion import samplers
    x = samplers.sample(samplers.ddim(schedule, 50), predict, x_T, keys).x

Names are loaded on first use, because `ddpm` needs the loop and the samplers need `ddpm`.
"""

import importlib
from typing import Any

# module -> the names that it adds to this one
_NAMES = {
    "by_level": "dpmpp_2s_ancestral dpmpp_sde euler euler_ancestral euler_inversion heun restart",
    "by_timestep": "ddim ddim_inversion ddpm_ancestral dpm_solver plms",
    "driver": "Sampler Samples initial_noise inpaint inverse sample segment start_from_image "
    "start_from_noise steps_of_strength",
    "few_steps": "consistency lcm mean_flow tcd",
    "multistep": "deis dpmpp_2m dpmpp_2m_sde dpmpp_3m_sde lms unipc",
    "sigmas": "",
    "timesteps": "visited_timesteps",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_HOMES])
