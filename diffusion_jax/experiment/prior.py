"""The `prior` section -> which images of its own a model goes on learning beside the user's."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.data.images import ALPHA
from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_section
from diffusion_jax.experiment.config.options import PriorOptions
from diffusion_jax.experiment.data import Data
from diffusion_jax.experiment.task import Task

PRIOR = Section(
    "config.prior",
    "Images that the model draws before training, and learns beside the data (DreamBooth).",
    ((PriorOptions, ()),),
)


def bind_prior(
    sections: Mapping[str, Any], data: Data, task: Task, batch_size: int
) -> PriorOptions | None:
    """Bind the `prior` section, None without one.

    Raises ConfigError for a wrong option, and for data or a model that it does not fit.
    Source: Ruiz et al. 2023 (DreamBooth), section 3.2.
    """
    if sections["prior"] is None:
        return None
    path = PRIOR.path
    options = PriorOptions(**bind_section(PRIOR, sections["prior"]).own[0])
    if task.drawing is None or data.num_frames is not None:
        raise ConfigError(f"{path} is for models that draw images")
    if all(embedder.text is None for embedder in task.embedders.values()):
        raise ConfigError(f"{path}.prompt = {options.prompt!r} needs a model that reads text")
    others = {"control": "hints", "latent_cache": "no latents of images that are drawn"}
    for name, why in others.items():
        if sections[name] is not None:
            raise ConfigError(f"config.{name} does not go with {path}: it reads or keeps {why}")
    if data.image_options.buckets:
        raise ConfigError(
            f"config.data.batches.buckets = True should be False with {path}, whose images have "
            "one size"
        )
    if data.image_options.loss_mask not in (None, ALPHA):
        raise ConfigError(
            f"config.data.batches.loss_mask = {data.image_options.loss_mask!r} does not go with "
            f"{path}, whose images have no masks"
        )
    rows = rows_of(options, batch_size)
    if not 0 < rows < batch_size or rows != options.share * batch_size:
        raise ConfigError(
            f"{path}.share = {options.share} of config.train.batch_size = {batch_size} should be a "
            f"whole number of samples, from 1 to {batch_size - 1}"
        )
    if options.num_images < rows:
        raise ConfigError(
            f"{path}.num_images = {options.num_images} should be at least {rows}, which a batch has"
        )
    return options


def rows_of(options: PriorOptions, batch_size: int) -> int:
    """Tell how many rows of a batch are images that the model drew."""
    return round(options.share * batch_size)
