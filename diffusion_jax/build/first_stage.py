"""The `first_stage` section -> a frozen autoencoder, in whose latents the network works."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.build.binding import (
    ConfigError,
    bind_shared,
    check_range,
    check_type,
    row,
    with_dtypes,
)
from diffusion_jax.models.autoencoder import Autoencoder
from diffusion_jax.models.regularizers import diagonal_gaussian, mode, sample
from diffusion_jax.models.tiling import in_chunks, tiled_decode
from diffusion_jax.types import Image, Keys, PyTree

FIRST_STAGES = {"autoencoder_kl": Autoencoder}


class Memory(NamedTuple):
    """How much is encoded and decoded at once, None for everything.

    samples_at_a_time: images of a batch. tile: side, in latent pixels, of the overlapping tiles
    that larger latents are decoded in; GroupNorm then sees tiles, which changes colours slightly.
    """

    samples_at_a_time: int | None = None
    tile: int | None = None


class FirstStage(NamedTuple):
    """A frozen autoencoder with a Gaussian posterior.

    The network works on scale_factor times its samples; with scale_by_std the factor is 1 / std of
    the first batch of a run, and saved with it. weights: a file or the run of a first stage,
    "random" for a dry run, or None for those of the checkpoint that is loaded.
    """

    module: nn.Module
    scale_factor: float
    scale_by_std: bool
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    factor: int
    weights: str | None
    memory: Memory = Memory()

    def init(self, key: Array) -> PyTree:
        """Initialise the parameters."""
        # Any size will do: the parameters are those of convolutions.
        image = jnp.zeros((1, 2 * self.factor, 2 * self.factor, self.image_shape[-1]))
        return self.module.init(key, image)["params"]

    def encode(self, params: PyTree, image: Image, keys: Keys | None) -> Array:
        """Draw latents from the posterior (without keys: take its mode), not scaled, float32.

        image [b h w c] in [-1, 1] -> [b h/f w/f z].
        """
        return self.draw(self.moments(params, image), keys)

    def moments(self, params: PyTree, image: Image) -> Array:
        """Encode images [b h w c] into the moments of their posteriors [b h/f w/f 2z], float32."""

        def encode(x: Array) -> Array:
            return jnp.asarray(self.module.apply({"params": params}, x, method="encode"))

        return self._few_at_a_time(encode, image).astype(jnp.float32)

    def draw(self, moments: Array, keys: Keys | None) -> Array:
        """Draw latents from the posterior that has these moments (without keys: take its mode)."""
        posterior = diagonal_gaussian(moments)
        return mode(posterior) if keys is None else sample(posterior, keys)

    def decode(self, params: PyTree, latents: Array) -> Array:
        """Decode latents [b h/f w/f z], not scaled -> images [b h w c], about [-1, 1], float32."""

        def decode(z: Array) -> Array:
            return jnp.asarray(self.module.apply({"params": params}, z, method="decode"))

        tile = self.memory.tile
        if tile is not None and max(latents.shape[1:3]) > tile:
            overlap, margin = tile // 4, tile // 16
            whole = functools.partial(
                tiled_decode,
                decode,
                factor=self.factor,
                tile=tile,
                overlap=overlap,
                margin=margin,
            )
        else:
            whole = decode
        return self._few_at_a_time(whole, latents).astype(jnp.float32)

    def _few_at_a_time(self, function: Callable[[Array], Array], x: Array) -> Array:
        size = self.memory.samples_at_a_time
        if size is None or size >= x.shape[0]:
            return function(x)
        return in_chunks(function, x, chunk_size=size)


def build_first_stage(section: Mapping[str, Any], image_shape: tuple[int, int, int]) -> FirstStage:
    """Build the first stage of a config for images of a shape; ConfigError for a wrong option."""
    path = "config.first_stage"
    section = {"weights": None, "scale_factor": 1.0, "scale_by_std": False} | dict(section)
    weights = check_type(section.pop("weights"), str | None, f"{path}.weights")
    scale = check_type(section.pop("scale_factor"), float, f"{path}.scale_factor")
    check_range(scale, f"{path}.scale_factor", low=1e-6)
    by_std = check_type(section.pop("scale_by_std"), bool, f"{path}.scale_by_std")
    if by_std and scale != 1.0:
        raise ConfigError(
            f"{path}.scale_factor = {scale} should be left out: scale_by_std computes it"
        )
    module_class = row(FIRST_STAGES, section, path)
    options, memory = bind_shared(
        with_dtypes(section, path), path, (module_class, ()), (Memory, ())
    )
    module = module_class(**options)
    for name, value in memory.items():
        if value is not None:
            check_range(value, f"{path}.{name}", low=1 if name == "samples_at_a_time" else 16)
    factor = 2 ** (len(module.ch_mult) - 1)
    height, width, _ = image_shape
    if height % factor or width % factor:
        raise ConfigError(
            f"config.data.batches.image_size = {(height, width)} should be a multiple of {factor}, "
            "the factor by which config.first_stage makes images smaller"
        )
    latent_shape = (height // factor, width // factor, module.embed_dim)
    return FirstStage(
        module, scale, by_std, image_shape, latent_shape, factor, weights, Memory(**memory)
    )
