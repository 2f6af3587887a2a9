"""Pictures of a first stage: reconstructions, their errors, samples, logits of the discriminator.

All are arrays in about [-1, 1] for the image hook: [b h w c], or [b 2 h w c] for pairs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.randomness import noise_like
from diffusion_jax.train.first_stage.loss import Networks, reconstruct
from diffusion_jax.types import Image, Keys, PyTree

# From the lowest value over 0 to the highest: pink, white, green, equally spaced, in [0, 1].
HEAT_COLOURS = (
    (0.55, 0.00, 0.32),
    (0.87, 0.47, 0.69),
    (0.97, 0.97, 0.97),
    (0.50, 0.74, 0.26),
    (0.15, 0.39, 0.10),
)
# How much the strongest logit hides of the picture under it.
BLEND = 0.8


def autoencoder_images(
    networks: Networks,
    params: PyTree,
    mutable: PyTree,
    image: Image,
    keys: Keys,
    *,
    averaged: PyTree | None = None,
    samples: bool = True,
    diff_boost_factor: float = 3.0,
) -> dict[str, Array]:
    """Make the pictures of a batch [b h w c] in [-1, 1] -> {name: images}; pure, may be jitted.

    Names: inputs, the names of error_images and logit_images and, with `samples`, samples: as many
    decoded latents from N(0, 1) as images. With averaged parameters also reconstructions_ema,
    diff_ema, diff_boost_ema and samples_ema. params and averaged have "autoencoder", params also
    "discriminator"; mutable is the TrainState's. Logits of rank 2 have no place and are not drawn.
    Source: generative-models, AutoencodingEngine.log_images; latent-diffusion, AutoencoderKL.
    """
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    drawn, of_samples = keys[:, 0], keys[:, 1]
    z = _latents(networks, params, mutable, image, of_samples) if samples else None
    log = {"inputs": image}
    versions = {"": params} if averaged is None else {"": params, "_ema": averaged}
    shown = image
    for suffix, version in versions.items():
        shown, _, _ = reconstruct(
            networks,
            version["autoencoder"],
            mutable["regularizer"],
            image,
            jax.random.clone(drawn),
            train=False,
        )
        pictures = error_images(image, shown, diff_boost_factor=diff_boost_factor)
        if z is not None:
            pictures["samples"] = networks.decode(version["autoencoder"], z, None)
        if suffix == "":
            pictures |= _logits(networks, params, mutable, image, shown)
        log |= {f"{name}{suffix}": picture for name, picture in pictures.items()}
    return log


def error_images(
    image: Image, reconstruction: Image, *, diff_boost_factor: float = 3.0
) -> dict[str, Array]:
    """Show reconstructions x' and their errors e = |clip(x') - x| / 2 as 2 e - 1; black is 0.

    Names: reconstructions, diff, and diff_boost with e times diff_boost_factor, clipped at 1.
    """
    error = jnp.clip(0.5 * jnp.abs(jnp.clip(reconstruction, -1.0, 1.0) - image), 0.0, 1.0)
    return {
        "reconstructions": reconstruction,
        "diff": 2.0 * error - 1.0,
        "diff_boost": 2.0 * jnp.clip(diff_boost_factor * error, 0.0, 1.0) - 1.0,
    }


def logit_images(
    image: Image,
    reconstruction: Image,
    real: Float[Array, "b i j 1"],
    fake: Float[Array, "b i j 1"],
) -> dict[str, Float[Array, "b 2 h w 3"]]:
    """Draw logits as heat maps, from pink (taken for false) over white to green (taken for real).

    Colours range from -high to high, the largest |logit| of all. A row is a sample: its image and
    its reconstruction. vis_logits are the maps, vis_logits_blended the pictures under them:
    a map hides the share 0.8 |logit| / high of its picture.
    Source: generative-models, GeneralLPIPSWithDiscriminator.log_images.
    """
    pictures = jnp.stack([image, reconstruction], axis=1)
    pictures = jnp.broadcast_to(jnp.clip(pictures, -1.0, 1.0), (*pictures.shape[:-1], 3))
    logits = jnp.stack([real, fake], axis=1).astype(jnp.float32)
    high = jnp.max(jnp.abs(logits))
    logits = logits / jnp.where(high > 0.0, high, 1.0)
    logits = _nearest(logits, *image.shape[1:3])
    heat = heat_colours(logits[..., 0])
    cover = BLEND * jnp.abs(logits)
    return {"vis_logits": heat, "vis_logits_blended": cover * heat + (1.0 - cover) * pictures}


def heat_colours(values: Float[Array, "*dims"]) -> Float[Array, "*dims 3"]:
    """Colour values in [-1, 1], linearly between HEAT_COLOURS -> RGB in [-1, 1]."""
    table = 2.0 * np.asarray(HEAT_COLOURS, np.float32) - 1.0
    places = np.linspace(-1.0, 1.0, len(table), dtype=np.float32)
    flat = values.reshape(-1)
    channels = [jnp.interp(flat, places, channel) for channel in table.T]
    return jnp.stack(channels, axis=-1).reshape(*values.shape, 3)


def _logits(
    networks: Networks, params: PyTree, mutable: PyTree, image: Array, shown: Array
) -> dict[str, Array]:
    adversary = (params["discriminator"], mutable["discriminator"])
    real, _ = networks.discriminate(*adversary, image, train=False)
    fake, _ = networks.discriminate(*adversary, shown, train=False)
    return logit_images(image, shown, real, fake) if real.ndim == 4 else {}


def _latents(
    networks: Networks, params: PyTree, mutable: PyTree, image: Array, keys: Keys
) -> Array:
    """Draw normal noise in the shape of the latents of these images."""

    def encode(image: Array, keys: Keys) -> Array:
        moments = networks.encode(params["autoencoder"], image, None)
        return networks.regularize(
            params["autoencoder"], mutable["regularizer"], moments, keys, train=False
        )[0]

    return noise_like(keys, jax.eval_shape(encode, image, keys).shape[1:])


def _nearest(values: Array, height: int, width: int) -> Array:
    """Resize [b n i j c] to [b n h w c]: row y shows row floor(y i / h), as torch's nearest."""
    rows, columns = values.shape[2:4]
    y = np.arange(height) * rows // height
    x = np.arange(width) * columns // width
    return values[:, :, y][:, :, :, x]
