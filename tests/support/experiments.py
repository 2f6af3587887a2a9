"""Experiments of shipped configs, each assembled once in a test session."""

import functools

import jax

from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config_files import load_config


@functools.cache
def built(path: str, *overrides: str, devices: int = 1) -> Experiment:
    """The experiment of a config with overrides on the first devices; nobody may change it.

    Tests that ask for the same one share its functions, and so what JAX traced and compiled.
    """
    config = load_config(path, list(overrides))
    return make_experiment(config, devices=jax.devices()[:devices])
