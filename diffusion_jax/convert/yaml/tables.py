"""What each option of latent-diffusion and generative-models is here: networks, noise, sampling.

One row for every option of a constructor, so that what is unknown is a typo or a fork's own. The
training loop's options are in yaml_lightning_tables.py. Source: the constructors of
CompVis/latent-diffusion, Stability-AI/stablediffusion and Stability-AI/generative-models.
"""

from diffusion_jax.convert.yaml.rows import Class, Drop, Key, Only, Table

FROZEN = "the first stage is frozen here"
WHOLE_BATCHES = "a batch is encoded as a whole; train.accumulate makes it smaller"
NO_DOWNLOAD = "nothing is downloaded: name a file in {section}.weights, or set train.ckpt_path"
VIDEO_CLASSES = (
    "VideoUNet",
    "SpatialUNetModelWithTime",
    "VideoDecoder",
    "LinearPredictionGuider",
    "TrianglePredictionGuider",
    "TrapezoidPredictionGuider",
    "SpatiotemporalPredictionGuider",
    "VideoPredictionEmbedderWithEncoder",
    "FrozenOpenCLIPImagePredictionEmbedder",
)

# in_channels, use_checkpoint, use_fp16, use_bf16, use_spatial_transformer, legacy and context_dim
# need a look at each other: yaml_parts.convert_unet.
UNET: Table = {
    "out_channels": Key("out_channels"),
    "model_channels": Key("model_channels"),
    "channel_mult": Key("channel_mult", (1, 2, 4, 8)),
    "num_res_blocks": Key("num_res_blocks"),
    "attention_resolutions": Key("attention_resolutions"),
    "dropout": Key("dropout"),
    "conv_resample": Key("conv_resample"),
    "num_heads": Key("num_heads"),
    "num_head_channels": Key("num_head_channels"),
    "num_heads_upsample": Key("num_heads_upsample"),
    "use_scale_shift_norm": Key("use_scale_shift_norm"),
    "resblock_updown": Key("resblock_updown"),
    "use_new_attention_order": Key("use_new_attention_order"),
    "use_linear_in_transformer": Key("use_linear_in_transformer"),
    "transformer_depth": Key("transformer_depth"),
    "num_classes": Key("num_classes"),
    "adm_in_channels": Key("adm_in_channels"),
    "disable_self_attentions": Key("disable_self_attentions"),
    "num_attention_blocks": Key("num_attention_blocks"),
    "disable_middle_self_attn": Key("disable_middle_self_attn"),
    "disable_middle_transformer": Key("disable_middle_transformer"),
    "n_embed": Key("n_embed"),
    "dims": Only((2,), "networks are two-dimensional"),
    "image_size": Drop("not needed: the network takes any size (it is unused there, too)"),
    "spatial_transformer_attn_type": Drop("not needed: model.attention_impl picks the kernel"),
    "sequential_crossattn": Only((False,), "a context for each depth comes from no embedder"),
}

AUTOENCODER: Table = {
    "embed_dim": Key("embed_dim"),
    "ckpt_path": Key("weights"),
    "ignore_keys": Only(((),), "a first stage is read whole"),
    "monitor": Drop(FROZEN),
    "image_key": Drop(FROZEN),
    "colorize_nlabels": Drop(FROZEN),
    "input_key": Drop(FROZEN),
    "ema_decay": Drop(FROZEN),
    "learn_logvar": Drop(FROZEN),
    "optimizer_config": Drop(FROZEN),
    "lr_g_factor": Drop(FROZEN),
    "max_batch_size": Drop(WHOLE_BATCHES),
    "n_embed": Drop("a Gaussian posterior has no codes"),
    "remap": Only((), "all codes are kept"),
    "sane_index_shape": Drop("not needed: codes are [b h w]"),
    "batch_resize_range": Drop(FROZEN),
    "use_ema": Drop(FROZEN),
    "scheduler_config": Drop(FROZEN),
}
DDCONFIG: Table = {
    "ch": Key("ch"),
    "out_ch": Key("out_ch"),
    "ch_mult": Key("ch_mult", (1, 2, 4, 8)),
    "num_res_blocks": Key("num_res_blocks"),
    "attn_resolutions": Key("attn_resolutions"),
    "resolution": Key("resolution"),
    "in_channels": Key("in_channels"),
    "z_channels": Key("z_channels"),
    "attn_type": Key("attn_type"),
    "dropout": Key("dropout"),
    "resamp_with_conv": Key("resamp_with_conv"),
    "tanh_out": Key("tanh_out"),
    "give_pre_end": Key("give_pre_end"),
    "double_z": Only((True,), "a Gaussian posterior has a mean and a variance"),
    "use_linear_attn": Only((False,), "the attention of first stages is full or none"),
}
# What is other in a quantised first stage.
CODES: Table = {"n_embed": Key("num_codes")}
SINGLE_Z: Table = {"double_z": Only((False,), "each latent of a codebook is one value")}
GAUSSIAN_STAGES = (
    "AutoencoderKL",
    "AutoencoderKLInferenceWrapper",
    "AutoencodingEngineLegacy",
    "AutoencoderKLModeOnly",
)
QUANTISED_STAGES = ("VQModelInterface", "VQModel", "AutoencoderLegacyVQ")

SCALINGS = {
    "EpsScaling": Class("eps"),
    "VScaling": Class("v"),
    "VScalingWithEDMcNoise": Class("v_edm"),
    "EDMScaling": Class("edm", {"sigma_data": Key("sigma_data")}),
}
WEIGHTINGS = {
    "UnitWeighting": Class("unit"),
    "EpsWeighting": Class("eps"),
    "VWeighting": Class("v"),
    "EDMWeighting": Class("edm", {"sigma_data": Key("sigma_data")}),
}
DISCRETIZATIONS = {
    "LegacyDDPMDiscretization": Class(
        "legacy_ddpm",
        {
            "linear_start": Key("linear_start", 0.00085),
            "linear_end": Key("linear_end", 0.012),
            "num_timesteps": Key("num_timesteps", 1000),
        },
    ),
    "EDMDiscretization": Class(
        "edm",
        {
            "sigma_min": Key("sigma_min", 0.002),
            "sigma_max": Key("sigma_max", 80.0),
            "rho": Key("rho", 7.0),
        },
    ),
}
_TABLE_OF_LEVELS: Table = {
    "num_idx": Key("num_idx", 1000),
    "do_append_zero": Only((False,), "a table of noise levels ends above 0"),
    "flip": Only((True,), "a table of noise levels ascends"),
}
DENOISERS = {
    "Denoiser": Class("continuous"),
    "DiscreteDenoiser": Class(
        "discrete", {**_TABLE_OF_LEVELS, "quantize_c_noise": Key("quantize_c_noise")}
    ),
}
SIGMA_SAMPLINGS = {
    "EDMSampling": Class("lognormal", {"p_mean": Key("p_mean"), "p_std": Key("p_std")}),
    "DiscreteSampling": Class("discrete", _TABLE_OF_LEVELS),
    "ZeroSampler": Class("zero"),
}
LOSSES = {
    "StandardDiffusionLoss": Class(
        "denoiser",
        {
            "offset_noise_level": Key("offset_noise_level"),
            "batch2model_keys": Only(((),), "what the network reads comes from embedders"),
        },
    )
}
_CHURN: Table = {name: Key(name) for name in ("s_churn", "s_tmin", "s_tmax", "s_noise")}
_ANCESTRAL: Table = {name: Key(name) for name in ("eta", "s_noise")}
_SAMPLER: Table = {
    "num_steps": Key("num_steps"),
    "verbose": Drop("not needed: sampling is one program, without a bar"),
    "device": Drop("not needed: mesh says which devices"),
}
SAMPLERS = {
    "EulerEDMSampler": Class("euler", {**_SAMPLER, **_CHURN}),
    "HeunEDMSampler": Class("heun", {**_SAMPLER, **_CHURN}),
    "EulerAncestralSampler": Class("euler_ancestral", {**_SAMPLER, **_ANCESTRAL}),
    "DPMPP2SAncestralSampler": Class("dpmpp_2s_ancestral", {**_SAMPLER, **_ANCESTRAL}),
    "DPMPP2MSampler": Class("dpmpp_2m", _SAMPLER),
    "LinearMultistepSampler": Class("lms", {**_SAMPLER, "order": Key("order")}),
}
GUIDERS = {
    "IdentityGuider": Class("none"),
    "VanillaCFG": Class(
        "cfg",
        {
            "scale": Key("scale"),
            "dyn_thresh_config": Drop("guidance.dynamic_percentile and norm_limit are ours"),
        },
    ),
}

_CLIP: Table = {
    "layer": Key("layer", "last"),
    "max_length": Key("max_length"),
    "device": Drop("not needed: mesh says which devices"),
}
# Embedders that need more than renaming are in yaml_conditioning.py.
EMBEDDERS = {
    "FrozenCLIPEmbedder": Class(
        "clip_text",
        {
            **_CLIP,
            "layer_idx": Key("layer_idx"),
            "always_return_pooled": Key("always_return_pooled"),
        },
    ),
    "FrozenOpenCLIPEmbedder": Class("open_clip_text", {"arch": Key("tower", "ViT-H-14"), **_CLIP}),
    "FrozenOpenCLIPEmbedder2": Class(
        "open_clip_text",
        {
            "arch": Key("tower", "ViT-H-14"),
            **_CLIP,
            "legacy": Key("legacy", True),
            "always_return_pooled": Key("always_return_pooled"),
        },
    ),
    "FrozenOpenCLIPImageEmbedder": Class(
        "open_clip_image",
        {
            "arch": Key("tower", "ViT-H-14"),
            "antialias": Key("antialias"),
            "unsqueeze_dim": Key("unsqueeze_dim"),
            "output_tokens": Key("output_tokens"),
            "ucg_rate": Only((0.0,), "the embedder's own ucg_rate is meant"),
            "max_length": Drop("not needed: unused there, too"),
            "device": Drop("not needed: mesh says which devices"),
            "repeat_to_max_len": Only((False,), "an image gives one token"),
            "num_image_crops": Only((0,), "an image is seen as a whole"),
        },
    ),
    "BERTEmbedder": Class(
        "transformer_text",
        {
            "n_embed": Key("width"),
            "n_layer": Key("num_layers"),
            "vocab_size": Key("vocab_size", 30522),
            "max_seq_len": Key("max_length"),
            "use_tokenizer": Only((True,), "tokens come from the caption"),
            "embedding_dropout": Only((0.0,), "the text encoder has no dropout"),
            "device": Drop("not needed: mesh says which devices"),
        },
    ),
    "ConcatTimestepEmbedderND": Class("numbers", {"outdim": Key("outdim")}),
    "ClassEmbedder": Class(
        "class_embedding",
        {"embed_dim": Key("embed_dim"), "key": Drop("not needed: the input is `label`")},
    ),
    "SpatialRescaler": Class(
        "spatial_rescaler",
        {
            "in_channels": Key("channels", 3),
            "n_stages": Key("n_stages"),
            "method": Key("method"),
            "multiplier": Key("multiplier"),
            "out_channels": Key("out_channels"),
            "bias": Key("bias"),
            "wrap_video": Only((False,), "there is no video"),
            "kernel_size": Only((1,), "the map of channels has a 1 x 1 kernel"),
            "remap_output": Only((False,), "channels are mapped where out_channels is set"),
        },
    ),
}
# input_key of a ConcatTimestepEmbedderND -> the input here, how many numbers it has, what stands
# for it when nothing is given.
NUMBERS = {
    "original_size_as_tuple": ("original_size", 2, "size"),
    "crop_coords_top_left": ("crop_top_left", 2, (0, 0)),
    "target_size_as_tuple": ("target_size", 2, "size"),
    "aesthetic_score": ("aesthetic_score", 1, (6.0,)),
}
INPUTS = {"txt": "caption", "cls": "label", "class_label": "label", "jpg": "image"}
# Which entries of the conditioning the embedders give -> how they enter the network.
CONDITIONING_KEYS = {
    frozenset(): "none",
    frozenset({"concat"}): "concat",
    frozenset({"crossattn"}): "crossattn",
    frozenset({"vector"}): "adm",
    frozenset({"concat", "crossattn"}): "hybrid",
    frozenset({"crossattn", "vector"}): "crossattn-adm",
    frozenset({"concat", "crossattn", "vector"}): "hybrid-adm",
}

SCHEDULE: Table = {
    "beta_schedule": Key("name", "linear"),
    "timesteps": Key("num_timesteps", 1000),
    "linear_start": Key("linear_start", 1e-4),
    "linear_end": Key("linear_end", 2e-2),
    "cosine_s": Key("cosine_s"),
    "given_betas": Key("given_betas"),
    "v_posterior": Key("v_posterior"),
    "parameterization": Key("parameterization", "eps"),
}
DDPM_LOSS: Table = {
    "loss_type": Key("loss_type", "l2"),
    "l_simple_weight": Key("l_simple_weight"),
    "original_elbo_weight": Key("original_elbo_weight"),
    "learn_logvar": Key("learn_logvar"),
    "logvar_init": Key("logvar_init"),
}
_OF_SUBCLASSES = (
    "low_scale_config low_scale_key noise_level_key concat_keys masked_image_key "
    "depth_stage_config reshuffle_patch_size embedder_config embedding_key "
    "embedding_dropout freeze_embedder noise_aug_config c_concat_log_start c_concat_log_end"
).split()
DDPM_OTHER: Table = {
    "first_stage_key": Only(("image", "jpg"), "the input is `image`; see data.batches.image_key"),
    "num_timesteps_cond": Only((1,), "conditions are never noised"),
    "use_positional_encodings": Only((False,), "there is no conditioning on positions"),
    "make_it_fit": Only((False,), "shapes have to fit; train.keep_dims widens the first layer"),
    "reset_ema": Drop("not needed: the average starts from the loaded weights"),
    "reset_num_ema_updates": Drop("not needed: a warm start counts the updates from 0"),
    "cond_stage_forward": Only((), "embedders have one way to be called"),
    "force_null_conditioning": Only((False,), "guidance.name = 'none' draws without a condition"),
    "finetune_keys": Only((), "the first layer's input is what train.keep_dims widens"),
    "keep_finetune_dims": Only((), "train.keep_dims is set by hand"),
    "split_input_params": Only((), "images are not cut into patches"),
    **{name: Drop("of a subclass of LatentDiffusion that is not here") for name in _OF_SUBCLASSES},
}
ENGINE_OTHER: Table = {
    "input_key": Only(("jpg", "image"), "the input is `image`; see data.batches.image_key"),
    "log_keys": Drop("not needed: hooks.images shows captions and labels"),
    "no_cond_log": Drop("hooks.images always shows captions and labels"),
    "compile_model": Drop("not needed: JAX always compiles"),
    "network_wrapper": Drop("not needed: conditioning.key says where conditions enter"),
    "en_and_decode_n_samples_a_time": Drop(WHOLE_BATCHES),
}
