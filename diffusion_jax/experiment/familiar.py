"""The names that other tools give to samplers, and what they are called here."""

import re

from diffusion_jax.diffusion.samplers.timesteps import DISCRETIZATIONS

# The name elsewhere, as `_plain` writes it -> sampler here, with options of it.
_LEVELS = {
    "euler": "euler",
    "eulerdiscrete": "euler",
    "euler a": "euler_ancestral",
    "euler ancestral": "euler_ancestral",
    "eulerancestraldiscrete": "euler_ancestral",
    "heun": "heun",
    "heundiscrete": "heun",
    "lms": "lms",
    "lmsdiscrete": "lms",
    "dpmpp 2m": "dpmpp_2m",
    "dpmsolvermultistep": "dpmpp_2m",
    "dpmpp 2m sde": "dpmpp_2m_sde",
    "dpmpp 2m sde heun": "dpmpp_2m_sde solver_type=heun",
    "dpmpp 3m sde": "dpmpp_3m_sde",
    "dpmpp 2s a": "dpmpp_2s_ancestral",
    "dpmpp 2s ancestral": "dpmpp_2s_ancestral",
    "dpmpp sde": "dpmpp_sde",
    "dpmsolversde": "dpmpp_sde",
    "unipc": "unipc",
    "uni pc": "unipc",
    "unipcmultistep": "unipc",
    "deis": "deis",
    "deismultistep": "deis",
    "restart": "restart",
}
_TIMESTEPS = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "plms": "plms",
    "pndm": "plms",
}
_FIXED_TIMESTEPS = {"lcm": "lcm", "dpm solver": "dpm_solver", "dpmsolver": "dpm_solver"}
# A grid elsewhere -> what it is here: the schedule's own levels are the default.
_GRIDS = {
    "karras": ["--config.discretization.name=karras"],
    "exponential": ["--config.discretization.name=exponential"],
    "normal": [],
    "simple": [],
    "uniform": [],
}
_SPACINGS = {name: [f"--config.sampler.discretize={name}"] for name in DISCRETIZATIONS}


def overrides_of(name: str) -> list[str] | None:
    """Find the overrides that make a familiar sampler, such as "DPM++ 2M Karras"; None if unknown.

    A name is a sampler's, or a sampler's and the name of its grid of noise levels.
    """
    words = _plain(name)
    head, _, tail = words.rpartition(" ")
    for samplers, grids in ((_LEVELS, _GRIDS), (_TIMESTEPS, _SPACINGS), (_FIXED_TIMESTEPS, {})):
        if words in samplers:
            head, grid = words, []
        elif head in samplers and tail in grids:
            grid = grids[tail]
        else:
            continue
        options = f"name={samplers[head]}".split()
        return [*(f"--config.sampler.{option}" for option in options), *grid]
    return None


def _plain(name: str) -> str:
    """Write a name in small letters and single spaces, without "k_" or "Scheduler" around it."""
    words = re.sub(r"[\s_-]+", " ", name.lower().replace("++", "pp")).strip()
    return words.removeprefix("k ").removesuffix("scheduler").removesuffix("sampler").strip()
