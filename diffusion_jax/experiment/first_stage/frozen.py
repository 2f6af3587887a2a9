"""The `first_stage` section -> a frozen autoencoder, in whose latents the network works."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from diffusion_jax.devices.placement import batch_parts, by_sample
from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_section, check_range
from diffusion_jax.experiment.config.options import ClipOptions, Codes, FirstStageOptions
from diffusion_jax.experiment.first_stage.regularizer import CODEBOOK
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.quantizers import VectorQuantizer, nearest_code
from diffusion_jax.models.first_stage.regularizers import diagonal_gaussian, mode, sample
from diffusion_jax.models.first_stage.tiling import (
    decode_in_clips,
    in_chunks,
    tiled_decode,
    tiled_encode,
)
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.randomness import noise_like
from diffusion_jax.types import Keys, PyTree

FIRST_STAGE = Section(
    "config.first_stage",
    "The frozen autoencoder in whose latents the network works; by default there is none.",
    ((FirstStageOptions, ()),),
    {
        "autoencoder_kl": Autoencoder,
        "autoencoder_video": VideoAutoencoder,
        "autoencoder_vq": Autoencoder,
    },
    extras={"autoencoder_video": ((ClipOptions, ()),), "autoencoder_vq": ((Codes, ()),)},
)
_LOWEST = {"samples_at_a_time": 1, "tile": 16, "scale_factor": 1e-6}


class FirstStage(NamedTuple):
    """A frozen autoencoder with a Gaussian posterior or, with codes, a codebook.

    The network works on scale_factor times its latents: samples of the posterior, or with a
    codebook the encoder's output before it is quantised, which involves no chance; the decoder
    quantises. With scale_by_std the factor is 1 / std of the first batch of a run, and is saved
    with the run. See FirstStageOptions for weights and memory.
    Videos [b t h w c] are encoded frame by frame. They are decoded so as well, or in
    an autoencoder_video by a decoder that sees all frames of a clip.
    Source: latent-diffusion, AutoencoderKL and VQModelInterface.
    """

    module: Autoencoder | VideoAutoencoder
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    factor: int
    options: FirstStageOptions
    codes: Codes | None = None
    clips: ClipOptions | None = None

    def init(self, key: Array) -> PyTree:
        """Initialise the parameters."""
        # Any size will do: parameters of convolutions do not depend on it.
        image = jnp.zeros((1, 2 * self.factor, 2 * self.factor, self.image_shape[-1]))
        image = image if self.clips is None else image[:, None]
        params = self.module.init(key, image)["params"]
        if self.codes is None:
            return params
        codebook = VectorQuantizer(
            self.codes.num_codes, self.module.embed_dim, param_dtype=self.module.param_dtype
        )
        z = jnp.zeros((1, 1, 1, self.module.embed_dim))
        return {**params, CODEBOOK: codebook.init(jax.random.fold_in(key, 1), z)["params"]}

    def encode(self, params: PyTree, image: Float[Array, "b *t h w c"], keys: Keys | None) -> Array:
        """Draw latents from the posterior of an image, or take its mode when keys is None.

        image [b h w c] in [-1, 1] -> float32 [b h/f w/f z], not scaled and not quantised. The
        latents of a video [b t h w c] are drawn with one key a clip.
        """
        return self.draw(self.moments(params, image), keys)

    def moments(self, params: PyTree, image: Float[Array, "b *t h w c"]) -> Array:
        """Encode images [b h w c] into the moments of their posteriors, float32 [b h/f w/f 2z].

        With a codebook these are the latents before they are quantised, [b h/f w/f z]. Videos
        [b t h w c] give [b t h/f w/f 2z].
        """
        params = _networks(params)

        def encode(x: Array) -> Array:
            return jnp.asarray(self.module.apply({"params": params}, x, method="encode"))

        return _by_frame(
            lambda image: self._bounded(encode, image, tiled_encode, self.factor), image
        )

    def draw(self, moments: Array, keys: Keys | None) -> Array:
        """Draw latents from the posterior with these moments, or take its mode without keys.

        With a codebook the moments are the latents already.
        """
        if self.codes is not None:
            return moments
        posterior = diagonal_gaussian(moments)
        if keys is None:
            return mode(posterior)
        return sample(posterior, noise_like(keys, posterior.mean.shape[1:]))

    def decode(self, params: PyTree, latents: Array) -> Array:
        """Decode latents [b h/f w/f z], not scaled -> images [b h w c], about [-1, 1], float32.

        Latents of videos are [b t h/f w/f z].
        """
        if self.clips is not None:
            return self._decode_clips(params, latents, self.clips)

        def decode(z: Array) -> Array:
            if self.codes is not None and self.codes.quantize:
                codebook = params[CODEBOOK]["embedding"].astype(jnp.float32)
                z = codebook[nearest_code(z.astype(jnp.float32), codebook)].astype(z.dtype)
            networks = {"params": _networks(params)}
            return jnp.asarray(self.module.apply(networks, z, method="decode"))

        return _by_frame(lambda z: self._bounded(decode, z, tiled_decode, 1), latents)

    def _decode_clips(self, params: PyTree, latents: Array, clips: ClipOptions) -> Array:
        """Decode [b t h w z] with a decoder of videos, or images [b h w z] as clips of one."""
        is_image = latents.ndim == 4

        def decode(z: Array) -> Array:
            stills = jnp.full(z.shape[:2], float(is_image))
            options = {"method": "decode", "image_only_indicator": stills}
            return jnp.asarray(self.module.apply({"params": params}, z, **options))

        def decode_tiles(z: Array) -> Array:
            """Decode in tiles, if they are asked for; frames stand beside the channels for that."""
            frames = z.shape[1]
            clip, beside = "b t h w c -> b h w (t c)", "b h w (t c) -> b t h w c"
            y = self._bounded(
                lambda z: rearrange(decode(rearrange(z, beside, t=frames)), clip),
                rearrange(z, clip),
                tiled_decode,
                1,
            )
            return rearrange(y, beside, t=frames)

        z = latents[:, None] if is_image else latents
        if clips.frames_at_a_time is None or clips.frames_at_a_time >= z.shape[1]:
            y = decode_tiles(z)
        else:
            size = {"frames": clips.frames_at_a_time, "overlap": clips.overlap}
            y = decode_in_clips(decode_tiles, z, **size)
        return y[:, 0] if is_image else y

    def _bounded(
        self, network: Callable[[Array], Array], x: Array, tiled: Callable[..., Array], unit: int
    ) -> Array:
        """Apply a network within the memory of options.tile and options.samples_at_a_time.

        unit: elements of x along one side of a latent pixel.
        """
        tile, size = self.options.tile, self.options.samples_at_a_time
        size = None if size is None else size * batch_parts(x.shape[0])  # so many on each device
        if tile is not None and max(x.shape[1:3]) > tile * unit:
            shape = {"tile": tile, "overlap": tile // 4, "margin": tile // 16}
            network = functools.partial(tiled, network, factor=self.factor, **shape)
        if size is not None and size < x.shape[0]:
            return in_chunks(network, x, chunk_size=size).astype(jnp.float32)
        return network(x).astype(jnp.float32)


def build_first_stage(section: Mapping[str, Any], image_shape: tuple[int, int, int]) -> FirstStage:
    """Build the first stage of a config for images of a shape; ConfigError for a wrong option."""
    bound = bind_section(FIRST_STAGE, section)
    path, options = FIRST_STAGE.path, FirstStageOptions(**bound.own[0])
    codes = Codes(**bound.extra[0]) if bound.name == "autoencoder_vq" else None
    clips = ClipOptions(**bound.extra[0]) if bound.name == "autoencoder_video" else None
    for name, low in _LOWEST.items():
        if getattr(options, name) is not None:
            check_range(getattr(options, name), f"{path}.{name}", low=low)
    if codes is not None:
        check_range(codes.num_codes, f"{path}.num_codes", low=1)
    if clips is not None and clips.frames_at_a_time is not None:
        low = clips.overlap + 1
        check_range(clips.frames_at_a_time, f"{path}.frames_at_a_time", low=low)
    if options.scale_by_std and options.scale_factor != 1.0:
        raise ConfigError(
            f"{path}.scale_factor = {options.scale_factor} should be left out: scale_by_std "
            "computes it"
        )
    fields: dict[str, Any] = {"double_z": codes is None}
    module = bound.factory(**fields | bound.keywords)
    if module.double_z != (codes is None):
        raise ConfigError(
            f"{path}.double_z = {module.double_z} should be {codes is None}: {path}.name = "
            f"{bound.name!r} has {'mean and variance' if codes is None else 'one value'} for "
            "each latent"
        )
    factor = 2 ** (len(module.ch_mult) - 1)
    height, width, _ = image_shape
    if height % factor or width % factor:
        raise ConfigError(
            f"config.data.batches.image_size = {(height, width)} should be a multiple of {factor}, "
            "the factor by which config.first_stage makes images smaller"
        )
    latent_shape = (height // factor, width // factor, module.embed_dim)
    return FirstStage(module, image_shape, latent_shape, factor, options, codes, clips)


def _by_frame(function: Callable[[Array], Array], x: Array) -> Array:
    """Apply a function of images [n h w c] to images, or to every frame of videos [b t h w c]."""
    if x.ndim == 4:
        return function(x)
    frames = function(by_sample(rearrange(x, "b t h w c -> (b t) h w c")))
    return rearrange(frames, "(b t) h w c -> b t h w c", b=x.shape[0])


def _networks(params: PyTree) -> PyTree:
    """Leave out the codebook, which is not a parameter of the module."""
    return {name: value for name, value in params.items() if name != CODEBOOK}
