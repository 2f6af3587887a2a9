"""The shapes of the UNets that were released, and of small ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.models.unet.multiview_unet import MultiviewUNet
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.models.unet.video_unet import VideoUNet

SD = {
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attention_resolutions": (4, 2, 1),
    "use_spatial_transformer": True,
}
SD2 = SD | {"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True}
# (fields, channels of x) of the networks of Rombach et al. and Podell et al., and of two toys.
RELEASED = {
    "sd1_v1-inference": (SD | {"num_heads": 8, "context_dim": 768, "legacy": True}, 4),
    "ldm_txt2img-1p4B-eval": (SD | {"num_heads": 8, "context_dim": 1280}, 4),
    "sd21": (SD2, 4),
    "sd2_v2-inpainting-inference": (SD2, 9),
    "sd2_x4-upscaling": (
        SD2
        | {
            "model_channels": 256,
            "channel_mult": (1, 2, 2, 4),
            "attention_resolutions": (2, 4, 8),
            "num_head_channels": -1,
            "num_heads": 8,
            "disable_self_attentions": (True, True, True, False),
            "num_classes": 1000,
        },
        7,
    ),
    "sdxl_base": (
        SD2
        | {
            "channel_mult": (1, 2, 4),
            "attention_resolutions": (4, 2),
            "transformer_depth": (1, 2, 10),
            "context_dim": 2048,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
        4,
    ),
    "sdxl_refiner": (
        SD2
        | {
            "model_channels": 384,
            "attention_resolutions": (4, 2),
            "transformer_depth": 4,
            "context_dim": (1280,) * 4,
            "num_classes": "sequential",
            "adm_in_channels": 2560,
        },
        4,
    ),
    "ldm_cin256-v2": (
        SD
        | {
            "out_channels": 3,
            "model_channels": 192,
            "channel_mult": (1, 2, 3, 5),
            "attention_resolutions": (8, 4, 2),
            "num_heads": 1,
            "context_dim": 512,
        },
        3,
    ),
    "imagenet_f8": (
        SD
        | {
            "model_channels": 256,
            "channel_mult": (1, 2, 4),
            "num_head_channels": 64,
            "context_dim": 1024,
            "num_classes": "sequential",
            "adm_in_channels": 1024,
        },
        4,
    ),
    "toy_mnist_cond": (
        {
            "out_channels": 1,
            "num_head_channels": 32,
            "use_spatial_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 128,
        },
        1,
    ),
}

SVD = {name: value for name, value in SD2.items() if name != "use_spatial_transformer"} | {
    "num_classes": "sequential",
    "adm_in_channels": 768,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": (3, 1, 1),
}
# Fields of the networks of Stable Video Diffusion and SV3D, for 8 channels.
VIDEO = {
    "svd": SVD,
    "sv3d_u": SVD | {"adm_in_channels": 256},
    "sv3d_p": SVD | {"adm_in_channels": 1280},
}
SV4D = {k: v for k, v in SVD.items() if k not in ("use_spatial_context", "video_kernel_size")}
SV4D = {k: v for k, v in SV4D.items() if k != "merge_strategy"} | {
    "adm_in_channels": 1280,
    "motion_context_dim": 4,
    "time_block_merge_strategy": "learned_with_images",
    "time_block_merge_factor": 0.0,
    "time_kernel_size": (3, 1, 1),
}
# The same of SV4D and SV4D 2; the 8 views of SV4D 2 come without use_3d_attention.
MULTIVIEW = {
    "sv4d": SV4D,
    "sv4d2": SV4D
    | {"use_camera_emb": True, "use_3d_attention": True, "separate_motion_merge_factor": True},
}


def multiview_shapes(module: MultiviewUNet, channels: int = 8) -> Any:
    """Shapes of the parameters of a network of several views, without computing any."""
    ones = jnp.ones
    context = ones((1, 2, 1, module.context_dim))
    y = None if module.num_classes is None else ones((1, 6, module.adm_in_channels))
    views = ones((1, 3, 8, 8, module.motion_context_dim))
    return jax.eval_shape(
        lambda key: module.init(
            key, ones((1, 6, 8, 8, channels)), ones(1), context, y, cond_view=views
        ),
        jax.random.key(0),
    )["params"]


def video_shapes(module: VideoUNet, channels: int = 8, frames: int = 2) -> Any:
    """Shapes of the parameters of a network of videos, without computing any."""
    ones = jnp.ones
    context = None if module.context_dim is None else ones((1, 1, module.context_dim))
    y = None if module.num_classes is None else ones((1, module.adm_in_channels))
    return jax.eval_shape(
        lambda key: module.init(key, ones((1, frames, 8, 8, channels)), ones(1), context, y),
        jax.random.key(0),
    )["params"]


def abstract_params(module: UNet, channels: int) -> Any:
    """Shapes of the parameters, without computing any."""
    dims = module.context_dim
    context = dims[0] if isinstance(dims, tuple) else dims
    ones = jnp.ones
    y = {
        None: lambda: None,
        "sequential": lambda: ones((1, module.adm_in_channels)),
        "continuous": lambda: ones(1),
        "timestep": lambda: ones(1),
    }.get(module.num_classes, lambda: ones(1, jnp.int32))

    def init(key: jax.Array) -> Any:
        tokens = None if context is None else ones((1, 3, context))
        return module.init(key, ones((1, 8, 8, channels)), ones(1), tokens, y())["params"]

    return jax.eval_shape(init, jax.random.key(0))


@functools.cache
def released_shapes(name: str, scan: bool = False) -> Any:
    """Shapes of the parameters of a released network; scan: as stacks of equal blocks."""
    fields, channels = RELEASED[name]
    return abstract_params(UNet(**fields, scan=scan), channels)
