"""The names that other tools give to samplers and recipes, and what they are called here."""

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from diffusion_jax.diffusion.samplers.timesteps import DISCRETIZATIONS

T = TypeVar("T")
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
# Models made for a few steps -> how their makers draw with them: no guidance, and an even grid from
# the last timestep, which `schedule` is.
_RECIPES = {
    "turbo": "sampler.name=euler_ancestral sampler.num_steps=1",
    "sd turbo": "sampler.name=euler_ancestral sampler.num_steps=1",
    "sdxl turbo": "sampler.name=euler_ancestral sampler.num_steps=1",
    "lightning": "sampler.name=euler sampler.num_steps=4",
    "sdxl lightning": "sampler.name=euler sampler.num_steps=4",
}
_UNGUIDED = "discretization.name=schedule guidance.name=none"
_TIMESTEPS = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "plms": "plms",
    "pndm": "plms",
}
_FIXED_TIMESTEPS = {
    "lcm": "lcm",
    "tcd": "tcd",
    "dpm solver": "dpm_solver",
    "dpmsolver": "dpm_solver",
}
# A grid elsewhere -> what it is here: the schedule's own levels are the default.
_GRIDS = {
    "karras": ["--config.discretization.name=karras"],
    "exponential": ["--config.discretization.name=exponential"],
    "normal": [],
    "simple": [],
    "uniform": [],
    "sgm uniform": [],
    "trailing": [],
}
_SPACINGS = {name: [f"--config.sampler.discretize={name}"] for name in DISCRETIZATIONS}


def overrides_of(name: str) -> list[str] | None:
    """Find the overrides that make a familiar sampler, such as "DPM++ 2M Karras"; None if unknown.

    A name is a sampler's, a sampler's and the name of its grid of noise levels, or a recipe's, such
    as "turbo".
    """
    words = _plain(name)
    if words in _RECIPES:
        return [f"--config.{option}" for option in f"{_RECIPES[words]} {_UNGUIDED}".split()]
    for samplers, grids in ((_LEVELS, _GRIDS), (_TIMESTEPS, _SPACINGS), (_FIXED_TIMESTEPS, {})):
        if words in samplers:
            head, grid = words, []
        elif (found := _cut(words, samplers, grids)) is not None:
            head, grid = found
        else:
            continue
        options = f"name={samplers[head]}".split()
        return [*(f"--config.sampler.{option}" for option in options), *grid]
    return None


def _cut(words: str, samplers: Collection[str], grids: Mapping[str, T]) -> tuple[str, T] | None:
    """Cut a name into a sampler and the value of its grid; None where it is not made of both."""
    for name, value in grids.items():
        head = words.removesuffix(f" {name}")
        if head != words and head in samplers:
            return head, value
    return None


def _plain(name: str) -> str:
    """Write a name in small letters and single spaces, without "k_" or "Scheduler" around it."""
    words = re.sub(r"[\s_-]+", " ", name.lower().replace("++", "pp")).strip()
    return words.removeprefix("k ").removesuffix("scheduler").removesuffix("sampler").strip()
