"""The models of a page: one set of weights, an experiment for each sampler."""

import functools
import pathlib
from collections.abc import Callable, Sequence

from diffusion_jax.experiment import make_experiment
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.released import config_for
from diffusion_jax.runs.start import open_run


def make_load(
    workdir: str | None,
    checkpoint: str | None,
    config: str | None = None,
    overrides: Sequence[str] = (),
) -> Callable[[str], Pipeline]:
    """Make load(sampler) -> a Pipeline; "" is the config's sampler, and each is made once.

    workdir: of a run. checkpoint: instead, a file or folder of weights, which config describes.
    """

    @functools.cache
    def weights() -> Pipeline:
        if workdir:
            return Pipeline.from_workdir(workdir, overrides=overrides)
        assert checkpoint is not None
        return Pipeline.from_checkpoint(checkpoint, config, overrides=overrides)

    @functools.cache
    def load(sampler: str) -> Pipeline:
        if not sampler:
            return weights()
        changed = [*overrides, f"--config.sampler.name={sampler}"]
        if workdir:
            built, _ = open_run(pathlib.Path(workdir), changed)
        else:
            assert checkpoint is not None
            built = make_experiment(config_for(checkpoint, config, changed))
        return weights()._replace(experiment=built)

    return load
