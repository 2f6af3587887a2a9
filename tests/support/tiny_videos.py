"""A tiny Stable Video Diffusion: its network with all that conditions it, and random numbers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.experiment.network import Network, build_network
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
STAGE = {
    "name": "autoencoder_video", "scale_factor": 0.18215, "weights": None, **CODER,
    "video_kernel_size": (3, 1, 1),
}  # fmt: skip


@functools.cache
def tiny(model: str = "svd") -> tuple[Network, Noise, Trained]:
    """Assemble "svd" or "sv3d_u" and draw numbers for it; nobody may change them."""
    embedders = {"svd": SVD, "sv3d_u": SV3D_U}[model]
    conditioning = {"key": "hybrid-adm", "embedders": embedders}
    network = build_network(MODEL, conditioning, (16, 16, 3), STAGE, num_frames=2)
    width = 256 * sum(one["name"] == "numbers" for one in embedders.values())
    inputs = (jnp.ones((1, 2, 8, 8, 8)), jnp.ones(1), jnp.ones((1, 1, 8)), jnp.ones((1, width)))
    params = jax.eval_shape(network.module.init, jax.random.key(0), *inputs)["params"]
    frozen = drawn(jax.eval_shape(network.init_frozen, jax.random.key(0)), 1)
    noise = build_noise(
        None,
        {"name": "continuous", "scaling": {"name": "v_edm"}},
        {"name": "edm", "sigma_max": 700.0},
    )
    trained = {"network": drawn(params, 2), "conditioner": {}}
    return network, noise, Trained(trained, {}, frozen | {"scale_factor": jnp.float32(0.18215)})
