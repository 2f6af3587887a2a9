"""The first stage of latent diffusion: autoencoder, regularizers, discriminator and LPIPS."""

from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.patchgan import NLayerDiscriminator
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder, VideoDecoder

__all__ = ["Autoencoder", "NLayerDiscriminator", "VideoAutoencoder", "VideoDecoder"]
