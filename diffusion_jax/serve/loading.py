"""The models of a page: one set of weights, an experiment for each sampler."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from diffusion_jax.experiment import make_experiment
from diffusion_jax.pipeline import Pipeline, with_files
from diffusion_jax.runs.beginning.start import open_run
from diffusion_jax.runs.files.released import config_for


def make_load(
    workdir: str | None,
    checkpoint: str | None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    *,
    loras: Mapping[str | os.PathLike, float] = MappingProxyType({}),
    embeddings: Sequence[tuple[str, str | None]] = (),
) -> Callable[[str], Pipeline]:
    """Make load(sampler) -> a Pipeline; "" is the config's sampler, and each is made once.

    workdir: of a run. checkpoint: instead, a file or folder of weights, which config describes.
    loras, embeddings: added to them, see Pipeline.with_lora and with_embedding.
    """

    @functools.cache
    def weights() -> Pipeline:
        if workdir:
            pipe = Pipeline.from_workdir(workdir, overrides=overrides)
        else:
            assert checkpoint is not None
            pipe = Pipeline.from_checkpoint(checkpoint, config, overrides=overrides)
        return with_files(pipe, loras, embeddings)

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
        # The words that the model knows by now are a part of its network.
        built = built.with_network(weights().experiment.network) if embeddings else built
        return weights()._replace(experiment=built)

    return load
