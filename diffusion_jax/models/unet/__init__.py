"""The UNet of diffusion models."""

from diffusion_jax.models.unet.unet import UNet

__all__ = ["UNet"]
