"""Diffusion models in JAX: a pure-functional trainer and sampler.

    from diffusion_jax import Pipeline, make_schedule

Names are loaded on first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion_jax.diffusion.schedule import Schedule, make_schedule
    from diffusion_jax.experiment import make_experiment
    from diffusion_jax.experiment.config.files import load_config
    from diffusion_jax.pipeline import Pipeline
    from diffusion_jax.runs.training import train_run

__version__ = "0.1.0"

_HOMES = {
    "Pipeline": "diffusion_jax.pipeline",
    "Schedule": "diffusion_jax.diffusion.schedule",
    "load_config": "diffusion_jax.experiment.config.files",
    "make_experiment": "diffusion_jax.experiment",
    "make_schedule": "diffusion_jax.diffusion.schedule",
    "train_run": "diffusion_jax.runs.training",
}
__all__ = [
    "Pipeline",
    "Schedule",
    "load_config",
    "make_experiment",
    "make_schedule",
    "train_run",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'diffusion_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
