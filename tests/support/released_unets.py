"""The shapes of the UNets that were released, and of small ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.models.unet.unet import UNet

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
