"""From a config to an Experiment: the only reader of a ConfigDict, section by section, with explicit tables."""

from diffusion_jax.build.experiment import Experiment, experiment

__all__ = ["Experiment", "experiment"]
