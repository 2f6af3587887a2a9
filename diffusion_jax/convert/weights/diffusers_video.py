"""The config.json of the networks in diffusers' pipeline of Stable Video Diffusion."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.convert.weights.diffusers_folder import VERSION, Config, refuse
from diffusion_jax.models.conditioning.text_embedders import CLIP_MEAN, CLIP_STD
from diffusion_jax.models.unet.options import per_level, sides_of
from diffusion_jax.types import PyTree


def video_unet_config(
    unet: Any, in_channels: int, *, sample_size: int, num_frames: int, time_dim: int = 256
) -> Config:
    """Translate the fields of our VideoUNet into a config of UNetSpatioTemporalConditionModel.

    unet: the module. sample_size: side of the latent. time_dim: channels in which each of the
    numbers behind y is embedded.
    Raises ValueError for a field that has no counterpart in diffusers.
    """
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    per_head = unet.num_head_channels
    depths = list(per_level(unet, "transformer_depth"))
    bad = {
        "merge_strategy": unet.merge_strategy != "learned_with_images",
        "video_kernel_size": sides_of(unet.video_kernel_size) != (3, 1, 1),
        "use_linear_in_transformer": not unet.use_linear_in_transformer,
        "use_spatial_context": not unet.use_spatial_context,
        "disable_temporal_crossattention": unet.disable_temporal_crossattention,
        "transformer_depth_middle": unet.transformer_depth_middle not in (None, depths[-1]),
        "max_ddpm_temb_period": unet.max_ddpm_temb_period != 10000,
        "context_dim": unet.context_dim is None,
        "num_classes": unet.num_classes != "sequential",
        "adm_in_channels": bool((unet.adm_in_channels or 0) % time_dim),
        "num_groups": unet.num_groups != 32,
        "patch_size": unet.patch_size != 1,
        "conv_resample": not unet.conv_resample,
        "resblock_updown": unet.resblock_updown,
        "use_scale_shift_norm": unet.use_scale_shift_norm,
        "num_head_channels": per_head != -1 and any(width % per_head for width in widths),
    }
    refuse(unet, bad, "UNetSpatioTemporalConditionModel")
    attends = [2**level in unet.attention_resolutions for level in range(len(widths))]
    kinds = ["CrossAttn" if attend else "" for attend in attends]
    blocks = per_level(unet, "num_res_blocks")
    return {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else list(blocks),
        "down_block_types": [f"{kind}DownBlockSpatioTemporal" for kind in kinds],
        "up_block_types": [f"{kind}UpBlockSpatioTemporal" for kind in reversed(kinds)],
        "cross_attention_dim": unet.context_dim,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "num_attention_heads": [
            unet.num_heads if per_head == -1 else width // per_head for width in widths
        ],
        "addition_time_embed_dim": time_dim,
        "projection_class_embeddings_input_dim": unet.adm_in_channels,
        "num_frames": num_frames,
    }


def video_vae_config(vae: Any, *, scale_factor: float) -> Config:
    """Translate the fields of our VideoAutoencoder into a config of AutoencoderKLTemporalDecoder.

    Raises ValueError for a field that has no counterpart in diffusers.
    """
    bad = {
        "num_res_blocks": vae.num_res_blocks != 2,  # its middle has as many as its levels
        "time_mode": vae.time_mode != "conv-only",
        "video_kernel_size": sides_of(vae.video_kernel_size) != (3, 1, 1),
        "merge_strategy": vae.merge_strategy != "learned",
        "double_z": not vae.double_z,
        "num_groups": vae.num_groups != 32,
        "attn_type": vae.attn_type == "none",
        "attn_resolutions": bool(vae.attn_resolutions),
        "resamp_with_conv": not vae.resamp_with_conv,
        "tanh_out": vae.tanh_out,
        "give_pre_end": vae.give_pre_end,
    }
    refuse(vae, bad, "AutoencoderKLTemporalDecoder")
    return {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "_diffusers_version": VERSION,
        "in_channels": vae.in_channels,
        "out_channels": vae.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.ch_mult),
        "block_out_channels": [vae.ch * mult for mult in vae.ch_mult],
        "layers_per_block": vae.num_res_blocks,
        "latent_channels": vae.z_channels,
        "sample_size": vae.resolution,
        "scaling_factor": scale_factor,
        "force_upcast": True,
    }


def vision_config(tower: Any, *, eps: float = 1e-5) -> Config:
    """Translate our ClipVisionTower into a config of CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "projection_dim": tower.projection_dim,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "num_channels": 3,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": tower.activation,
        "layer_norm_eps": eps,
    }


def pixels_config(tower: Any) -> Config:
    """Describe what our ClipVisionTower expects of pixels as a config of CLIPImageProcessor."""
    size = tower.image_size
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def levels_config(*, sigma_min: float, sigma_max: float) -> Config:
    """Describe v-prediction on EDM's noise levels as a config of EulerDiscreteScheduler.

    The timesteps that the pipeline of Stable Video Diffusion gives to its network are ln(sigma) / 4
    with it. Betas are written because it asks for them; no noise level is read from them.
    """
    return {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": VERSION,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
        "steps_offset": 1,
        "timestep_spacing": "leading",  # x begins with sqrt(sigma_max^2 + 1)
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }


def join_vae(first_stage: PyTree, frames: PyTree | None) -> PyTree:
    """Make the autoencoder of diffusers' pipeline: its encoder is for the conditioning frame.

    first_stage: parameters of a VideoAutoencoder. frames: of EncodedFrames; None where the first
    stage encodes the frame. Without a quant_conv it is one that changes nothing.
    """
    encoder = {name: first_stage[name] for name in first_stage if name != "decoder"}
    encoder = encoder if frames is None else dict(frames)
    bias = encoder["encoder"]["conv_out"]["bias"]
    same = {
        "kernel": jnp.eye(len(bias), dtype=bias.dtype)[None, None],
        "bias": jnp.zeros_like(bias),
    }
    return {"quant_conv": same, **encoder, "decoder": first_stage["decoder"]}


def fold_quant_conv(params: PyTree) -> PyTree:
    """Move the 1 x 1 convolution after an encoder into the encoder's last convolution."""
    after, last = params["quant_conv"], params["encoder"]["conv_out"]
    exact = jax.lax.Precision.HIGHEST
    matrix = after["kernel"][0, 0]
    folded = {
        "kernel": jnp.matmul(last["kernel"], matrix, precision=exact),
        "bias": jnp.matmul(last["bias"], matrix, precision=exact) + after["bias"],
    }
    folded = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), folded, last)
    kept = {name: value for name, value in params.items() if name != "quant_conv"}
    return {**kept, "encoder": {**params["encoder"], "conv_out": folded}}
