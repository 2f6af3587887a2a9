"""The UNets of diffusion models."""

from diffusion_jax.models.unet.control_net import ControlNet
from diffusion_jax.models.unet.multiview_unet import MultiviewUNet
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.models.unet.video_unet import VideoUNet

__all__ = ["ControlNet", "MultiviewUNet", "UNet", "VideoUNet"]
