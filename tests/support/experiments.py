"""Experiments of shipped configs, each assembled once in a test session."""

import functools

import jax

from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.task import Trained
from support.trees import drawn


@functools.cache
def built(path: str, *overrides: str, devices: int = 1) -> Experiment:
    """The experiment of a config with overrides on the first devices; nobody may change it.

    Tests that ask for the same one share its functions, and so what JAX traced and compiled.
    """
    config = load_config(path, list(overrides))
    return make_experiment(config, devices=jax.devices()[:devices])


@functools.cache
def trained(path: str, *overrides: str) -> Trained:
    """Random numbers for all that the experiment of a config holds, averages beside them; nothing
    is compiled for them, and nobody may change them."""
    experiment = built(path, *overrides)
    state = experiment.abstract_state()
    frozen = drawn(experiment.abstract_frozen(), 1) | experiment.frozen_constants()
    ema = drawn(experiment.task.averaged_part(state.params), 3)
    return Trained(drawn(state.params, 2), drawn(state.mutable, 4), frozen, ema)
