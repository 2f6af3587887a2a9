"""Tiny models of videos: each network with all that conditions it, and random numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.experiment.network.building import build_network
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import Noise, build_noise
from diffusion_jax.experiment.task import Trained
from support.trees import drawn

CODER = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 2}  # the only number that diffusers has
FRAME = {"name": "encoded_frames", "ucg_rate": 0.1, "weights": None, **CODER}
CLIP = {
    "name": "open_clip_image", "input_key": "cond_frames_without_noise", "unsqueeze_dim": True,
    "width": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "projection_dim": 8,
    "ucg_rate": 0.1, "weights": None,
}  # fmt: skip


def number(key: str) -> dict[str, Any]:
    return {"name": "numbers", "input_key": key, "size": 1}


SVD = {
    "clip": CLIP, "fps": number("fps_id"), "motion": number("motion_bucket_id"), "frame": FRAME,
    "level": number("cond_aug"),
}  # fmt: skip
SV3D_U = {"clip": CLIP, "frame": FRAME, "level": number("cond_aug")}
MODEL = {
    "name": "video_unet", "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1,
    "attention_resolutions": (1,), "num_head_channels": 16, "use_linear_in_transformer": True,
    "use_spatial_context": True, "merge_strategy": "learned_with_images",
    "video_kernel_size": (3, 1, 1), "extra_ff_mix_layer": True,
}  # fmt: skip
FRAMES = {"name": "encoded_frames", "weights": None, **CODER}
# Two times of two views.
SV4D = {
    "clip": {**CLIP, "unsqueeze_dim": False, "frames": 2},
    "frame": {**FRAMES, "frames": 2, "copies": 2, "level_dim": 256},
    "polar": {**number("polar_rad"), "outdim": 512, "frames": 4},
    "azimuth": {**number("azimuth_rad"), "outdim": 512, "frames": 4},
    "view": {**FRAMES, "input_key": "cond_view", "frames": 2, "entry": "cond_view"},
    "motion": {**FRAMES, "input_key": "cond_motion", "frames": 2, "entry": "cond_motion"},
}
VIEWS_MODEL = {
    "name": "multiview_unet", "out_channels": 4, "model_channels": 32, "channel_mult": (1, 2),
    "num_res_blocks": 1, "attention_resolutions": (1,), "num_head_channels": 16,
    "use_linear_in_transformer": True, "context_dim": 8, "num_classes": "sequential",
    "adm_in_channels": 1280, "motion_context_dim": 4, "extra_ff_mix_layer": True,
    "time_block_merge_strategy": "learned_with_images", "time_block_merge_factor": 0.0,
    "time_kernel_size": (3, 1, 1),
}  # fmt: skip
VIEWS_STAGE = {
    "name": "autoencoder_kl", "scale_factor": 0.18215, "embed_dim": 4, "use_quant_conv": False,
    "weights": None, **CODER,
}  # fmt: skip
SECOND = {"use_camera_emb": True, "separate_motion_merge_factor": True}
STAGE = {
    "name": "autoencoder_video", "scale_factor": 0.18215, "weights": None, **CODER,
    "video_kernel_size": (3, 1, 1),
}  # fmt: skip


# Name -> (model, embedders, first stage, frames of a clip).
MODELS: dict[str, Any] = {
    "svd": (MODEL, SVD, STAGE, 2),
    "sv3d_u": (MODEL, SV3D_U, STAGE, 2),
    "sv4d": (VIEWS_MODEL, SV4D, VIEWS_STAGE, 4),
    "sv4d2": (VIEWS_MODEL | SECOND, SV4D, VIEWS_STAGE, 4),
}


@functools.cache
def tiny(name: str = "svd") -> tuple[Network, Noise, Trained]:
    """Assemble a row of MODELS and draw numbers for it; nobody may change them."""
    model, embedders, stage, num_frames = MODELS[name]
    conditioning = {"key": "hybrid-adm", "embedders": embedders}
    network = build_network(model, conditioning, (16, 16, 3), stage, num_frames=num_frames)
    params = drawn(jax.eval_shape(network.init, jax.random.key(0)), 2)
    frozen = drawn(jax.eval_shape(network.init_frozen, jax.random.key(0)), 1)
    noise = build_noise(
        None,
        {"name": "continuous", "scaling": {"name": "v_edm"}},
        {"name": "edm", "sigma_max": 700.0},
    )
    return network, noise, Trained(params, {}, frozen | {"scale_factor": jnp.float32(0.18215)})
