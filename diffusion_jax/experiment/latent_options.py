"""The `latent_cache` section -> its options, checked against what it would have to hold."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_section
from diffusion_jax.experiment.config.options import LatentCacheOptions
from diffusion_jax.experiment.data import Data
from diffusion_jax.experiment.network.network import Network

LATENT_CACHE = Section(
    "config.latent_cache",
    "Train from latents that are encoded once; by default images are encoded at every step.",
    ((LatentCacheOptions, ()),),
)


def bind_latent_cache(
    sections: Mapping[str, Any], data: Data, network: Network | None
) -> LatentCacheOptions | None:
    """Bind the `latent_cache` section, None without one; network is None when none denoises.

    Raises ConfigError for a wrong option, and when the data or the network cannot use a cache.
    """
    if sections["latent_cache"] is None:
        return None
    path = LATENT_CACHE.path
    options = LatentCacheOptions(**bind_section(LATENT_CACHE, sections["latent_cache"]).own[0])
    if network is None or network.first_stage is None:
        raise ConfigError(f"{path} needs config.first_stage, whose latents it would keep")
    if data.batch_options["crop"] == "random":
        raise ConfigError(
            f"config.data.batches.crop = 'random' should be 'center' or 'stretch' with {path}: it "
            "encodes an image once, and a random crop is another image each time"
        )
    if data.image_options.loss_mask is not None:
        raise ConfigError(
            f"config.data.batches.loss_mask = {data.image_options.loss_mask!r} should be left out "
            f"with {path}, which keeps no masks"
        )
    if data.image_options.tags is not None and options.text:
        raise ConfigError(
            f"config.data.batches.tags = {data.image_options.tags!r} should be left out, or "
            f"{path}.text be False: the outputs of text encoders are kept for whole captions"
        )
    for name, embedder in network.embedders.items():
        is_image = embedder.input_key == "image" or embedder.staged is not None
        if is_image or embedder.frames is not None:
            raise ConfigError(
                f"config.conditioning.embedders.{name} reads the {embedder.input_key}, which "
                f"training from {path} does not have: leave one of them out"
            )
    return options
