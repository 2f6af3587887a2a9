"""The `first_stage` section -> a frozen autoencoder, in whose latents the network works."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.experiment.binding import (
    ConfigError,
    bind_shared,
    check_range,
    check_type,
    row,
    with_dtypes,
)
from diffusion_jax.experiment.regularizer import CODEBOOK
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.quantizers import VectorQuantizer, nearest_code
from diffusion_jax.models.first_stage.regularizers import diagonal_gaussian, mode, sample
from diffusion_jax.models.first_stage.tiling import in_chunks, tiled_decode
from diffusion_jax.randomness import noise_like
from diffusion_jax.types import Image, Keys, PyTree

FIRST_STAGES = {"autoencoder_kl": Autoencoder, "autoencoder_vq": Autoencoder}


class Codes(NamedTuple):
    """The codebook of an autoencoder_vq.

    num_codes: how many there are. quantize: whether latents become their nearest codes before they
    are decoded (False is latent-diffusion's force_not_quantize).
    """

    num_codes: int = 8192
    quantize: bool = True


class Memory(NamedTuple):
    """How much is encoded and decoded at once, None for everything.

    samples_at_a_time: images of a batch. tile: side, in latent pixels, of the overlapping tiles
    that larger latents are decoded in; GroupNorm then sees tiles, which changes colours slightly.
    """

    samples_at_a_time: int | None = None
    tile: int | None = None


class FirstStage(NamedTuple):
    """A frozen autoencoder with a Gaussian posterior or, with codes, a codebook.

    The network works on scale_factor times its latents: samples of the posterior, or what the
    encoder of a codebook's autoencoder gives before it is quantised, which is no matter of chance;
    the decoder quantises. With scale_by_std the factor is 1 / std of the first batch of a run, and
    saved with it. weights: a file or the run of a first stage, "random" for a dry run, or None for
    those of the checkpoint that is loaded.
    Source: latent-diffusion, AutoencoderKL and VQModelInterface.
    """

    module: nn.Module
    scale_factor: float
    scale_by_std: bool
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    factor: int
    weights: str | None
    memory: Memory = Memory()
    codes: Codes | None = None

    def init(self, key: Array) -> PyTree:
        """Initialise the parameters."""
        # Any size will do: the parameters are those of convolutions.
        image = jnp.zeros((1, 2 * self.factor, 2 * self.factor, self.image_shape[-1]))
        params = self.module.init(key, image)["params"]
        if self.codes is None:
            return params
        codebook = VectorQuantizer(
            self.codes.num_codes, self.module.embed_dim, param_dtype=self.module.param_dtype
        )
        z = jnp.zeros((1, 1, 1, self.module.embed_dim))
        return {**params, CODEBOOK: codebook.init(jax.random.fold_in(key, 1), z)["params"]}

    def encode(self, params: PyTree, image: Image, keys: Keys | None) -> Array:
        """Draw latents from the posterior (without keys: take its mode), not scaled, float32;
        those of a codebook are not quantised.

        image [b h w c] in [-1, 1] -> [b h/f w/f z].
        """
        return self.draw(self.moments(params, image), keys)

    def moments(self, params: PyTree, image: Image) -> Array:
        """Encode images [b h w c] into the moments of their posteriors [b h/f w/f 2z], float32;
        of a codebook's autoencoder into its latents [b h/f w/f z]."""
        params = _networks(params)

        def encode(x: Array) -> Array:
            return jnp.asarray(self.module.apply({"params": params}, x, method="encode"))

        return self._few_at_a_time(encode, image).astype(jnp.float32)

    def draw(self, moments: Array, keys: Keys | None) -> Array:
        """Draw latents from the posterior that has these moments (without keys: take its mode);
        with a codebook the moments are the latents."""
        if self.codes is not None:
            return moments
        posterior = diagonal_gaussian(moments)
        if keys is None:
            return mode(posterior)
        return sample(posterior, noise_like(keys, posterior.mean.shape[1:]))

    def decode(self, params: PyTree, latents: Array) -> Array:
        """Decode latents [b h/f w/f z], not scaled -> images [b h w c], about [-1, 1], float32."""

        def decode(z: Array) -> Array:
            if self.codes is not None and self.codes.quantize:
                codebook = params[CODEBOOK]["embedding"].astype(jnp.float32)
                z = codebook[nearest_code(z.astype(jnp.float32), codebook)].astype(z.dtype)
            networks = {"params": _networks(params)}
            return jnp.asarray(self.module.apply(networks, z, method="decode"))

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
    module, memory, codes = _parts(section, path)
    factor = 2 ** (len(module.ch_mult) - 1)
    height, width, _ = image_shape
    if height % factor or width % factor:
        raise ConfigError(
            f"config.data.batches.image_size = {(height, width)} should be a multiple of {factor}, "
            "the factor by which config.first_stage makes images smaller"
        )
    latent_shape = (height // factor, width // factor, module.embed_dim)
    return FirstStage(
        module, scale, by_std, image_shape, latent_shape, factor, weights, memory, codes
    )


def _parts(section: Mapping[str, Any], path: str) -> tuple[Autoencoder, Memory, Codes | None]:
    module_class = row(FIRST_STAGES, section, path)
    quantised = section["name"] == "autoencoder_vq"
    section = {"double_z": not quantised} | with_dtypes(section, path)
    targets = [(module_class, ()), (Memory, ()), *([(Codes, ())] if quantised else [])]
    options, memory, *codes = bind_shared(section, path, *targets)
    if options["double_z"] == quantised:
        raise ConfigError(
            f"{path}.double_z = {quantised} should be {not quantised}: {path}.name = "
            f"{section['name']!r} has {'one value' if quantised else 'mean and variance'} for "
            "each latent"
        )
    lowest = {"samples_at_a_time": 1, "tile": 16, "num_codes": 1}
    for name, low in lowest.items():
        value = section[name] if name in section else None
        if value is not None:
            check_range(value, f"{path}.{name}", low=low)
    own = Codes(**codes[0]) if quantised else None
    return module_class(**options), Memory(**memory), own


def _networks(params: PyTree) -> PyTree:
    """Leave the codebook out, which is no part of the module."""
    return {name: value for name, value in params.items() if name != CODEBOOK}
