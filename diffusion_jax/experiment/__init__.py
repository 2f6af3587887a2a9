"""From a config to an Experiment, section by section: the only reader of a ConfigDict."""

from collections.abc import Sequence

import jax
import ml_collections

from diffusion_jax.experiment.experiment import Experiment, assemble

__all__ = ["Experiment", "make_experiment"]


def make_experiment(
    config: ml_collections.ConfigDict, *, devices: Sequence[jax.Device] | None = None
) -> Experiment:
    """Build the Experiment of a config; nothing is trained, read or written.

    devices: of the mesh, default all. Raises ValueError, naming path, value and choices, for
    any option of any section that is unknown, of the wrong type, missing, or does not fit another.
    """
    return assemble(config.to_dict(), devices)  # references are resolved: everything is plain
