"""What each option of latent-diffusion and generative-models is here: networks, noise, sampling.

One row for every option of a constructor, so that an unknown one is a typo or belongs to a fork.
The options of the training loop are in lightning_tables.py. Source: the constructors of
CompVis/latent-diffusion, Stability-AI/stablediffusion and Stability-AI/generative-models.
"""

from diffusion_jax.convert.yaml.rows import As, Class, Drop, Only, Table, drop, keep

FROZEN = "the first stage is frozen here"
WHOLE_BATCHES = "a batch is encoded as a whole; train.accumulate makes it smaller"
NO_DOWNLOAD = "nothing is downloaded: name a file in {section}.weights, or set train.ckpt_path"
DEVICES = "not needed: mesh says which devices"
INPUT_IS_IMAGE = Only(("image", "jpg"), "the input is `image`; see data.batches.image_key")
ALL_CODES = "all codes are kept"
# in_channels, use_checkpoint, use_fp16, use_bf16, use_spatial_transformer, legacy and context_dim
# depend on each other: parts.convert_unet reads them.
UNET: Table = {
    **keep("out_channels model_channels", channel_mult=(1, 2, 4, 8)),
    **keep(
        "num_res_blocks attention_resolutions dropout conv_resample num_heads num_head_channels "
        "num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order "
        "use_linear_in_transformer transformer_depth num_classes adm_in_channels "
        "disable_self_attentions num_attention_blocks disable_middle_self_attn "
        "disable_middle_transformer n_embed"
    ),
    "dims": Only((2,), "networks are two-dimensional"),
    "image_size": Drop("not needed: the network takes any size (it is unused there, too)"),
    "spatial_transformer_attn_type": Drop("not needed: model.attention_impl picks the kernel"),
    "sequential_crossattn": Only((False,), "a context for each depth comes from no embedder"),
}

AUTOENCODER: Table = {
    "embed_dim": As("embed_dim"),
    "ckpt_path": As("weights"),
    "ignore_keys": Only(((),), "a first stage is read whole"),
    "max_batch_size": Drop(WHOLE_BATCHES),
    "n_embed": Drop("a Gaussian posterior has no codes"),
    "remap": Only((), ALL_CODES),
    "sane_index_shape": Drop("not needed: codes are [b h w]"),
    **drop(
        "monitor image_key colorize_nlabels input_key ema_decay learn_logvar optimizer_config "
        "lr_g_factor batch_resize_range use_ema scheduler_config",
        FROZEN,
    ),
}
DDCONFIG: Table = {
    **keep("ch out_ch", ch_mult=(1, 2, 4, 8)),
    **keep(
        "num_res_blocks attn_resolutions resolution in_channels z_channels attn_type dropout "
        "resamp_with_conv tanh_out give_pre_end"
    ),
    "double_z": Only((True,), "a Gaussian posterior has a mean and a variance"),
    "use_linear_attn": Only((False,), "the attention of first stages is full or none"),
}
# What is different in a quantised first stage.
CODES: Table = {"n_embed": As("num_codes")}
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
    "EDMScaling": Class("edm", keep("sigma_data")),
}
WEIGHTINGS = {
    "UnitWeighting": Class("unit"),
    "EpsWeighting": Class("eps"),
    "VWeighting": Class("v"),
    "EDMWeighting": Class("edm", keep("sigma_data")),
}
LEGACY_LEVELS = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000}
DISCRETIZATIONS = {
    "LegacyDDPMDiscretization": Class("legacy_ddpm", keep(**LEGACY_LEVELS)),
    "ZeroSNRDDPMDiscretization": Class(
        "zero_snr",
        {
            **keep(**LEGACY_LEVELS),
            "shift_scale": Only((1.0,), "levels are not shifted"),
            **{
                key: Only((False,), "levels are not shifted, and the first is kept as it is")
                for key in ("keep_start", "post_shift")
            },
        },
    ),
    "EDMDiscretization": Class("edm", keep(sigma_min=0.002, sigma_max=80.0, rho=7.0)),
}
_TABLE_OF_LEVELS: Table = {
    **keep(num_idx=1000),
    "do_append_zero": Only((False,), "a table of noise levels ends above 0"),
    "flip": Only((True,), "a table of noise levels ascends"),
}
DENOISERS = {
    "Denoiser": Class("continuous"),
    "DiscreteDenoiser": Class("discrete", {**_TABLE_OF_LEVELS, **keep("quantize_c_noise")}),
}
SIGMA_SAMPLINGS = {
    "EDMSampling": Class("lognormal", keep("p_mean p_std")),
    "DiscreteSampling": Class("discrete", _TABLE_OF_LEVELS),
    "ZeroSampler": Class("zero"),
}
LOSSES = {
    "StandardDiffusionLoss": Class(
        "denoiser",
        {
            **keep("offset_noise_level"),
            "batch2model_keys": Only(((),), "what the network reads comes from embedders"),
        },
    )
}


def _sampler(name: str, options: str = "") -> Class:
    own = {
        "verbose": Drop("not needed: sampling is one program, without a bar"),
        "device": Drop(DEVICES),
    }
    return Class(name, {**keep("num_steps"), **own, **keep(options)})


SAMPLERS = {
    "EulerEDMSampler": _sampler("euler", "s_churn s_tmin s_tmax s_noise"),
    "HeunEDMSampler": _sampler("heun", "s_churn s_tmin s_tmax s_noise"),
    "EulerAncestralSampler": _sampler("euler_ancestral", "eta s_noise"),
    "DPMPP2SAncestralSampler": _sampler("dpmpp_2s_ancestral", "eta s_noise"),
    "DPMPP2MSampler": _sampler("dpmpp_2m"),
    "LinearMultistepSampler": _sampler("lms", "order"),
}
GUIDERS = {
    "IdentityGuider": Class("none"),
    "VanillaCFG": Class(
        "cfg",
        {
            **keep("scale"),
            "dyn_thresh_config": Drop("guidance.dynamic_percentile and norm_limit are ours"),
        },
    ),
}

_CLIP: Table = {**keep(layer="last"), **keep("max_length"), "device": Drop(DEVICES)}
_TOWER: Table = {"arch": As("tower", "ViT-H-14")}
# conditioning.py reads the options of embedders that need more than another name.
EMBEDDERS = {
    "FrozenCLIPEmbedder": Class("clip_text", {**_CLIP, **keep("layer_idx always_return_pooled")}),
    "FrozenOpenCLIPEmbedder": Class("open_clip_text", {**_TOWER, **_CLIP}),
    "FrozenOpenCLIPEmbedder2": Class(
        "open_clip_text",
        {**_TOWER, **_CLIP, **keep(legacy=True), **keep("always_return_pooled")},
    ),
    "FrozenOpenCLIPImageEmbedder": Class(
        "open_clip_image",
        {
            **_TOWER,
            **keep("antialias unsqueeze_dim output_tokens"),
            "ucg_rate": Only((0.0,), "the embedder's own ucg_rate is meant"),
            "max_length": Drop("not needed: unused there, too"),
            "device": Drop(DEVICES),
            "repeat_to_max_len": Only((False,), "an image gives one token"),
            "num_image_crops": Only((0,), "an image is seen as a whole"),
        },
    ),
    "BERTEmbedder": Class(
        "transformer_text",
        {
            "n_embed": As("width"),
            "n_layer": As("num_layers"),
            **keep(vocab_size=30522),
            "max_seq_len": As("max_length"),
            "use_tokenizer": Only((True,), "tokens come from the caption"),
            "embedding_dropout": Only((0.0,), "the text encoder has no dropout"),
            "device": Drop(DEVICES),
        },
    ),
    "ConcatTimestepEmbedderND": Class("numbers", keep("outdim")),
    "ClassEmbedder": Class(
        "class_embedding",
        {**keep("embed_dim"), "key": Drop("not needed: the input is `label`")},
    ),
    "SpatialRescaler": Class(
        "spatial_rescaler",
        {
            "in_channels": As("channels", 3),
            **keep("n_stages method multiplier out_channels bias"),
            "wrap_video": Only((False,), "there is no video"),
            "kernel_size": Only((1,), "the map of channels has a 1 x 1 kernel"),
            "remap_output": Only((False,), "channels are mapped where out_channels is set"),
        },
    ),
}
# input_key of a ConcatTimestepEmbedderND -> the input here, how many numbers it has, and the value
# that stands for it when nothing is given.
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
    # What only the network of several views reads is no matter of the key.
    frozenset({"concat", "crossattn", "vector", "cond_view"}): "hybrid-adm",
}

SCHEDULE: Table = {
    "beta_schedule": As("name", "linear"),
    "timesteps": As("num_timesteps", 1000),
    **keep(linear_start=1e-4, linear_end=2e-2),
    **keep("cosine_s given_betas v_posterior", parameterization="eps"),
    "rescale_betas_zero_snr": As("rescale_zero_snr"),
}
DDPM_LOSS: Table = {
    **keep(loss_type="l2"),
    **keep("l_simple_weight original_elbo_weight learn_logvar logvar_init"),
}
DDPM_OTHER: Table = {
    "first_stage_key": INPUT_IS_IMAGE,
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
    **drop(
        "low_scale_config concat_keys masked_image_key "
        "depth_stage_config reshuffle_patch_size embedder_config embedding_key "
        "embedding_dropout freeze_embedder noise_aug_config c_concat_log_start c_concat_log_end",
        "of a subclass of LatentDiffusion that is not here",
    ),
}
ENGINE_OTHER: Table = {
    "input_key": INPUT_IS_IMAGE,
    "log_keys": Drop("not needed: hooks.images shows captions and labels"),
    "no_cond_log": Drop("hooks.images always shows captions and labels"),
    "compile_model": Drop("not needed: JAX always compiles"),
    "network_wrapper": Drop("not needed: conditioning.key says where conditions enter"),
    "en_and_decode_n_samples_a_time": Drop(WHOLE_BATCHES),
}
