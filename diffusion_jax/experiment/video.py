"""A config whose model denoises clips of video: a Task much like the one of images."""

import functools
from collections.abc import Mapping
from typing import Any

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.diffusion import denoising
from diffusion_jax.experiment.network.building import build_network
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.task import Setting, Task
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.train.step import LossFn
from diffusion_jax.types import Batch, Keys, PyTree


def make_video(sections: Mapping[str, Any], setting: Setting) -> Task:
    """Make the Task of a diffusion model of clips [b t h w c]; ConfigError for a wrong option."""
    data = setting.data
    network = build_network(
        sections["model"],
        sections["conditioning"],
        data.image_shape,
        sections["first_stage"],
        data.num_frames,
    )
    if isinstance(network.module, UNet):
        raise ConfigError(
            f"config.model.name = {sections['model']['name']!r} denoises images, and "
            f"config.data.batches.num_frames = {data.num_frames} makes clips of video; choose "
            "video_unet, or leave num_frames out"
        )
    return denoising(sections, setting, network, functools.partial(on_clips, network))


def on_clips(network: Network, loss_fn: LossFn) -> LossFn:
    """Let a loss see batches with the conditioning frame of each clip, see frames.add_frame."""

    def loss(
        params: PyTree, mutable: PyTree, frozen: PyTree, batch: Batch, keys: Keys, *, train: bool
    ) -> Any:
        batch = network.with_conditioning_frame(batch, keys)
        return loss_fn(params, mutable, frozen, batch, keys, train=train)

    return loss
