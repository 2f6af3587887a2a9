"""Images and masks that join what is denoised on the channels, as factories of embedders."""

from diffusion_jax.models.conditioning.conditioner import Embedder, Identity
from diffusion_jax.models.conditioning.spatial_rescaler import LowResolution


def concat_image(
    *,
    input_key: str,
    channels: int,
    ucg_rate: float = 0.0,
    ucg_group: str | None = None,
    ucg_from: float = 0.0,
) -> Embedder:
    """Join batch[input_key] [b h w channels] to the network's input; dropped samples see zeros."""
    dropping = {"ucg_group": ucg_group, "ucg_from": ucg_from}
    return Embedder(Identity(), input_key, ucg_rate, channels=channels, **dropping)


def image_latents(
    *,
    input_key: str,
    scaled: bool = True,
    ucg_rate: float = 0.0,
    ucg_group: str | None = None,
    ucg_from: float = 0.0,
) -> Embedder:
    """Join the latents of the image batch[input_key] [b h w c] to the network's input.

    They are the mode of the posterior of config.first_stage, with scaled times the scale factor of
    latents; without a first stage they are the image. Dropped samples see zeros.
    Source: Brooks et al. 2023 (InstructPix2Pix), section 3.2, where they are not scaled.
    """
    dropping = {"ucg_group": ucg_group, "ucg_from": ucg_from}
    staged = "latents" if scaled else "mode"
    return Embedder(Identity(), input_key, ucg_rate, staged=staged, **dropping)


def inpainting_mask(*, input_key: str = "mask") -> Embedder:
    """Join to the network's input where it should draw: 1 minus the mask batch[input_key].

    The mask [b h w 1] is 1 where the image is kept. Each latent pixel takes the top left one of the
    pixels that it stands for.
    Source: latent-diffusion, LatentInpaintDiffusion.
    """
    return Embedder(Identity(), input_key, staged="hole")


def low_resolution(
    *, factor: int, channels: int, ucg_rate: float = 0.0, input_key: str = "image"
) -> Embedder:
    """Join a copy of the image at 1 / factor of its resolution to the network's input: upscaling.

    The input is the image itself, float [b h w channels] in [-1, 1], in training and in sampling.
    Source: Saharia et al. 2021 (SR3), section 2; latent-diffusion, section 4.4.
    """
    return Embedder(LowResolution(factor), input_key, ucg_rate, channels=channels)
