"""The config.json of diffusers' networks of videos."""

from typing import Any

from diffusion_jax.convert.weights.diffusers_folder import VERSION, Config, refuse
from diffusion_jax.models.unet.options import per_level, sides_of


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
