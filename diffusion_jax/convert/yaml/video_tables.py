"""What each option of generative-models' video models is here: networks, embedders, guidance."""

from diffusion_jax.convert.yaml.rows import As, Class, Drop, Only, Table, drop, keep
from diffusion_jax.convert.yaml.tables import AUTOENCODER, FROZEN, WHOLE_BATCHES

# in_channels, context_dim and use_checkpoint are read by parts.convert_unet.
_NETWORK: Table = {
    **keep("out_channels model_channels", channel_mult=(1, 2, 4, 8)),
    **keep(
        "num_res_blocks attention_resolutions dropout conv_resample num_heads num_head_channels "
        "use_scale_shift_norm resblock_updown transformer_depth_middle num_classes adm_in_channels "
        "disable_temporal_crossattention extra_ff_mix_layer max_ddpm_temb_period "
        "use_linear_in_transformer"
    ),
    "dims": Only((2,), "kernels over time are video_kernel_size"),
    "num_heads_upsample": Only((-1,), "the way up has as many heads as the way down"),
    "time_downup": Only((False,), "the number of frames stays the same"),
    "spatial_transformer_attn_type": Drop("not needed: model.attention_impl picks the kernel"),
}
VIDEO_UNET: Table = {
    **_NETWORK,
    **keep(
        "use_spatial_context time_context_dim merge_strategy merge_factor video_kernel_size",
    ),
}
MULTIVIEW_UNET: Table = {
    **_NETWORK,
    **keep(
        "time_block_merge_strategy time_block_merge_factor motion_block_merge_factor "
        "time_kernel_size motion_context_dim use_camera_emb use_3d_attention "
        "separate_motion_merge_factor"
    ),
    "legacy": Only((False,), "num_head_channels is the width of a head"),
    "use_new_attention_order": Only((False,), "there is no attention without a context"),
    "use_spatial_transformer": Only((True,), "attention stands in transformer blocks"),
    "use_spatial_context": Only((True,), "the blocks over time see the context of the first time"),
    "use_temporal_resblock": Only((True,), "residual blocks have one over time beside them"),
    "use_motion_attention": Only((True,), "cond_view is attended to"),
    "time_mix_legacy": Only((False,), "AlphaBlender makes the blends"),
    "replicate_time_mix_bug": Drop("not needed: it has no effect there"),
    **drop("time_context_dim view_context_dim view_block_merge_factor", "of no shipped model"),
}
NETWORKS: dict[str, tuple[str, Table]] = {
    "VideoUNet": ("video_unet", VIDEO_UNET),
    "SpatialUNetModelWithTime": ("multiview_unet", MULTIVIEW_UNET),
}

# How a decoder of videos differs from one of images.
VIDEO_DECODER: Table = keep("video_kernel_size alpha merge_strategy time_mode")

_GUIDER: Table = {
    "max_scale": As("scale"),
    **keep("min_scale"),
    "additional_cond_keys": Drop("not needed: guidance takes all conditions"),
}
GUIDERS = {
    "LinearPredictionGuider": Class("linear", _GUIDER),
    "TrianglePredictionGuider": Class("triangle", {**_GUIDER, **keep("period period_fusing")}),
    "TrapezoidPredictionGuider": Class("trapezoid", {**_GUIDER, **keep("edge_perc")}),
    "SpatiotemporalPredictionGuider": Class("spatiotemporal", {**_GUIDER, **keep("num_views")}),
}

CLIP = "FrozenOpenCLIPImagePredictionEmbedder"
FRAMES = "VideoPredictionEmbedderWithEncoder"
# Of FRAMES. n_cond_frames, encoder_config and the two configs of sigma are read by video.py.
FRAMES_OPTIONS: Table = {
    "n_copies": Only((1,), "the network repeats what belongs to a whole clip"),
    "is_ae": Only((True,), "an autoencoder's encoder encodes the frames"),
    "scale_factor": Only((1.0,), "what is encoded is not scaled"),
    "disable_encoder_autocast": Drop("not needed: dtype of the embedder says it"),
    "en_and_decode_n_samples_a_time": Drop(WHOLE_BATCHES),
}
FRAMES_ENCODER: Table = {
    **{key: row for key, row in AUTOENCODER.items() if key not in ("embed_dim", "ckpt_path")},
    "embed_dim": Drop("not needed: it is z_channels"),
    "ckpt_path": As("weights"),
}
FRAMES_DDCONFIG: Table = {
    **keep("ch ch_mult num_res_blocks attn_resolutions resolution in_channels", z_channels=4),
    **keep("attn_type"),
    "double_z": Only((True,), "a Gaussian posterior has a mean and a variance"),
    "resamp_with_conv": Only((True,), "sides are halved by convolutions"),
    "use_linear_attn": Only((False,), "the attention of first stages is full or none"),
    "dropout": Only((0.0,), FROZEN),
    **drop("out_ch tanh_out give_pre_end", "nothing is decoded"),
}
# input_key of a ConcatTimestepEmbedderND -> the number when nothing is given; None where there is
# one for each frame.
FRAME_NUMBERS: dict[str, tuple[float, ...] | None] = {
    "fps_id": (6.0,),
    "motion_bucket_id": (127.0,),
    "cond_aug": (0.02,),
    "polars_rad": None,
    "azimuths_rad": None,
    "polar_rad": None,
    "azimuth_rad": None,
}
# How many frames the released models have, by their guidance; the YAML of SV4D says it.
FRAMES_OF = {"linear": 14, "triangle": 21}
