"""Folders that diffusers loads: weights, and the config.json from which it builds each network."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_jax.convert.weights.exporting import check_target, export_params, save_weights
from diffusion_jax.convert.weights.places import DIFFUSERS, slots_of
from diffusion_jax.models.unet.options import per_level
from diffusion_jax.types import PyTree

# The configs are valid from this version of diffusers on.
VERSION = "0.36.0"
# The folder of the tokenizer of each text encoder.
TOKENIZERS = {"text": "tokenizer", "text_2": "tokenizer_2"}
Config = dict[str, Any]


def unet_config(
    unet: Any, in_channels: int, *, sample_size: int, text_time: bool = True, time_dim: int = 256
) -> Config:
    """Translate the fields of our UNet into the config of diffusers' UNet2DConditionModel.

    unet: the module. sample_size: side of the latent. text_time: used for num_classes =
    "sequential"; True when y is a pooled text and numbers that are embedded in time_dim channels
    each (SDXL), False when y enters as it is (unCLIP, with the name map "unet_diffusers_class").
    Raises ValueError for a field that has no counterpart in diffusers.
    """
    _check_unet(unet)
    levels = range(len(unet.channel_mult))
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    attends = [2**level in unet.attention_resolutions for level in levels]
    alone = unet.disable_self_attentions
    per_head = unet.num_head_channels
    heads = [width // per_head for width in widths] if per_head != -1 else unet.num_heads
    down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    up = ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    dims = unet.context_dim
    blocks = per_level(unet, "num_res_blocks")
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else list(blocks),
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": dims if isinstance(dims, int) else dims[0],
        # diffusers expects numbers of heads under this name.
        "attention_head_dim": heads,
        "transformer_layers_per_block": list(per_level(unet, "transformer_depth")),
        "use_linear_projection": unet.use_linear_in_transformer,
        "only_cross_attention": list(alone) if alone else False,
        "mid_block_only_cross_attention": unet.disable_middle_self_attn,
        "resnet_time_scale_shift": "scale_shift" if unet.use_scale_shift_norm else "default",
        "norm_num_groups": unet.num_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "dropout": unet.dropout,
        "time_cond_proj_dim": unet.time_cond_proj_dim,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "center_input_sample": False,
        **_classes(unet, text_time, time_dim),
    }


# What a ControlNet has not of the config of a UNet.
_UP_ONLY = ("sample_size", "out_channels", "up_block_types", "mid_block_only_cross_attention")


def control_config(
    unet: Any, in_channels: int, hint_channels: Sequence[int], *, time_dim: int = 256
) -> Config:
    """Translate the fields of a ControlNet into the config of diffusers' ControlNetModel.

    unet: the options of the network that it steers. time_dim: see unet_config.
    Raises ValueError for a field that has no counterpart in diffusers.
    """
    differ = len(set(per_level(unet, "num_res_blocks"))) > 1
    bad = {"num_res_blocks": differ, "disable_middle_self_attn": unet.disable_middle_self_attn}
    refuse(unet, bad, _CONTROL)
    config = unet_config(unet, in_channels, sample_size=1, time_dim=time_dim)
    return {
        **{name: value for name, value in config.items() if name not in (*_UP_ONLY, "dropout")},
        "_class_name": _CONTROL,
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": list(hint_channels),
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
    }


_CONTROL = "ControlNetModel"


def _classes(unet: Any, text_time: bool, time_dim: int) -> Config:
    kind = unet.num_classes
    if kind is None:
        return {}
    if isinstance(kind, int):
        return {"num_class_embeds": kind}
    if kind == "timestep":
        return {"class_embed_type": "timestep"}
    if kind == "continuous":
        return {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 1,
        }
    width = {"projection_class_embeddings_input_dim": unet.adm_in_channels}
    if not text_time:
        return {"class_embed_type": "projection", **width}
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": time_dim, **width}


def _check_unet(unet: Any) -> None:
    per_head, dims = unet.num_head_channels, unet.context_dim
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    bad = {
        "use_spatial_transformer": not unet.use_spatial_transformer,
        "context_dim": dims is None or (not isinstance(dims, int) and len(set(dims)) > 1),
        "resblock_updown": unet.resblock_updown,
        "conv_resample": not unet.conv_resample,
        "patch_size": unet.patch_size != 1,
        "embeds_duration": unet.embeds_duration,
        "n_embed": unet.n_embed is not None,
        "num_attention_blocks": unet.num_attention_blocks is not None,
        "num_heads_upsample": unet.num_heads_upsample not in (-1, unet.num_heads),
        "num_head_channels": per_head != -1 and any(width % per_head for width in widths),
        "disable_middle_transformer": unet.disable_middle_transformer,
    }
    refuse(unet, bad, "UNet2DConditionModel")


def refuse(module: Any, bad: Mapping[str, bool], theirs: str) -> None:
    """Raise ValueError for the first bad field of a module, which diffusers has no place for."""
    for field in (field for field, is_bad in bad.items() if is_bad):
        raise ValueError(
            f"{field} = {getattr(module, field)!r} has no counterpart in diffusers' {theirs}; "
            "export this network as a .safetensors file"
        )


def vae_config(vae: Any, *, scale_factor: float, num_codes: int | None = None) -> Config:
    """Translate the fields of our Autoencoder into the config of diffusers' AutoencoderKL.

    num_codes: the size of the codebook, for an autoencoder with one; it becomes a VQModel.
    Raises ValueError for a field that has no counterpart in diffusers.
    """
    name = "AutoencoderKL" if num_codes is None else "VQModel"
    bad = {
        "double_z": vae.double_z == (num_codes is not None),
        "embed_dim": num_codes is None and vae.embed_dim != vae.z_channels,
        "use_quant_conv": num_codes is not None and not vae.use_quant_conv,
        "resamp_with_conv": not vae.resamp_with_conv,
        "tanh_out": vae.tanh_out,
        "give_pre_end": vae.give_pre_end,
    }
    refuse(vae, bad, name)
    levels = range(len(vae.ch_mult))
    attends = [vae.resolution // 2**level in vae.attn_resolutions for level in levels]
    down = ["AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends]
    up = ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)]
    shared: Config = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "in_channels": vae.in_channels,
        "out_channels": vae.out_ch,
        "block_out_channels": [vae.ch * mult for mult in vae.ch_mult],
        "layers_per_block": vae.num_res_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "latent_channels": vae.z_channels,
        "norm_num_groups": vae.num_groups,
        "sample_size": vae.resolution,
        "scaling_factor": scale_factor,
        "act_fn": "silu",
        "mid_block_add_attention": vae.attn_type != "none",
    }
    if num_codes is not None:
        return shared | {"num_vq_embeddings": num_codes, "vq_embed_dim": vae.embed_dim}
    return shared | {
        "use_quant_conv": vae.use_quant_conv,
        "use_post_quant_conv": vae.use_quant_conv,
    }


def text_config(
    params: Any, *, num_heads: int, hidden_act: str, eps: float = 1e-5, eos_token_id: int = 2
) -> Config:
    """Write the config of a CLIP text encoder for transformers.

    params: its parameters, or their shapes, from which the sizes are read. hidden_act:
    "quick_gelu" (OpenAI) or "gelu" (OpenCLIP). eos_token_id: of the token that is pooled; 2 pools
    at the largest, as all released configs of diffusers do, which a new token would be.
    """
    vocabulary, width = params["embeddings"]["token_embedding"]["embedding"].shape
    layers = params["encoder"]
    stacked = layers["layers"] if "layers" in layers else None
    first = layers["layers_0"] if stacked is None else stacked
    depth = len(layers) if stacked is None else first["mlp"]["fc1"]["bias"].shape[0]
    projects = "text_projection" in params
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": first["mlp"]["fc1"]["bias"].shape[-1],
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "max_position_embeddings": params["embeddings"]["position_embedding"]["embedding"].shape[0],
        "hidden_act": hidden_act,
        "layer_norm_eps": eps,
        "projection_dim": params["text_projection"]["kernel"].shape[-1] if projects else width,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": eos_token_id,
    }


def penultimate_text(params: PyTree) -> PyTree:
    """Drop what Stable Diffusion 2 never uses of its text tower: last layer and projection.

    diffusers applies the final norm after the last layer of the file, so its text encoder of
    Stable Diffusion 2 has 23 of the 24 layers. params: a tree of layers_0, layers_1, ...
    """
    layers = params["encoder"]
    last = f"layers_{len(layers) - 1}"
    kept = {name: layer for name, layer in layers.items() if name != last}
    return {k: v for k, v in params.items() if k != "text_projection"} | {"encoder": kept}


def unused_of_penultimate(num_layers: int) -> tuple[str, str]:
    """Match the names of what penultimate_text drops, for `zeros` of importing.Rules."""
    return rf"(text_model\.)?encoder\.layers\.{num_layers - 1}\.", r"text_projection\."


def save_diffusers(
    folder: str | os.PathLike,
    components: Mapping[str, Any],
    configs: Mapping[str, Config],
    tokenizers: Mapping[str, Mapping[str, str]] | None = None,
    card: Callable[..., str] | None = None,
    *,
    dtype: Any = None,
    nonfinite: bool = False,
) -> None:
    """Write a folder that diffusers loads: weights and config.json of every component.

    components: see places.export_checkpoint, with the slots of places.DIFFUSERS. configs: by
    component ("network", "first_stage", "text", ...), and of "scheduler" and "feature_extractor",
    which have no weights. With a network comes a model_index.json of a Stable Diffusion or Stable
    Video Diffusion pipeline. tokenizers: the files of the tokenizer of "text" or "text_2". card:
    (name, pipeline) -> the text of README.md. nonfinite: see export_params.
    Raises FileExistsError when the folder exists, ValueError when a component has no config.
    """
    slots = slots_of(DIFFUSERS, components)
    absent = [name for name in slots if name not in configs]
    if absent:
        raise ValueError(f"component {absent[0]!r} has no config; there are {list(configs)}")
    written = {"dtype": dtype, "nonfinite": nonfinite}
    folder = Path(folder)
    with _new_folder(folder) as unfinished:
        for name, (slot, tree) in slots.items():
            named = slot.name_map
            if name == "network" and "class_embed_type" in configs[name]:
                named = f"{named}_class"
            _write_component(unfinished / slot.place, tree, configs[name], named, **written)
        for name, file in _WITHOUT_WEIGHTS.items():
            if name in configs:
                _write_json(unfinished / name / file, configs[name])
        for name, files in (tokenizers or {}).items():
            place = unfinished / TOKENIZERS[name]
            place.mkdir(parents=True)
            for file, text in files.items():
                (place / file).write_text(text, encoding="utf-8")
        if "network" in slots:
            index = _model_index(slots, configs, tokenizers or {})
            _write_json(unfinished / "model_index.json", index)
            if card is not None:
                text = card(folder.name, index["_class_name"])
                (unfinished / "README.md").write_text(text, encoding="utf-8")


def save_control(folder: str | os.PathLike, params: PyTree, config: Config, **written: Any) -> None:
    """Write a folder that diffusers' ControlNetModel loads; written: dtype, nonfinite."""
    with _new_folder(Path(folder)) as unfinished:
        _write_component(unfinished, params, config, "control_diffusers", **written)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a place to write, which becomes the folder once all is written."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another name or remove it")
    check_target(folder)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_component(
    place: Path, params: PyTree, config: Config, name_map: str, **written: Any
) -> None:
    stem = "model" if name_map.startswith("clip") else "diffusion_pytorch_model"
    save_weights(place / f"{stem}.safetensors", [export_params(params, name_map, **written)])
    _write_json(place / "config.json", config)


def _model_index(
    slots: Mapping[str, Any], configs: Mapping[str, Config], tokenizers: Mapping[str, Any]
) -> Config:
    """Write the model_index.json of the pipeline that has this network and these text encoders."""
    texts = tuple(name for name in ("text", "text_2") if name in slots)
    is_video = "num_frames" in configs["network"]
    pipeline = _STABLE_VIDEO_DIFFUSION if is_video else _PIPELINES[texts]
    index: Config = {"_diffusers_version": VERSION, **pipeline}
    network = configs["network"]
    if pipeline is _STABLE_DIFFUSION and "in_channels" in network:
        more = network["in_channels"] - network["out_channels"]
        index["_class_name"] = _WITH_IMAGES.get(more, index["_class_name"])
    for name, (slot, _) in slots.items():
        if "architectures" in configs[name]:
            index[slot.place] = ["transformers", configs[name]["architectures"][0]]
        else:
            index[slot.place] = ["diffusers", configs[name]["_class_name"]]
    index |= {TOKENIZERS[name]: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    if "scheduler" in configs:
        index["scheduler"] = ["diffusers", configs["scheduler"]["_class_name"]]
    if "feature_extractor" in configs:
        kind = configs["feature_extractor"]["image_processor_type"]
        index["feature_extractor"] = ["transformers", kind]
    return index


_STABLE_DIFFUSION: Config = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
_STABLE_VIDEO_DIFFUSION: Config = {
    "_class_name": "StableVideoDiffusionPipeline",
    "feature_extractor": [None, None],
}
# Channels that a network reads beside its latents -> the pipeline that gives it an image in them.
_WITH_IMAGES = {5: "StableDiffusionInpaintPipeline", 4: "StableDiffusionInstructPix2PixPipeline"}
# Parts of a pipeline that have no weights -> the file of their config in the folder of that name.
_WITHOUT_WEIGHTS = {
    "scheduler": "scheduler_config.json",
    "feature_extractor": "preprocessor_config.json",
}
# Text encoders -> pipeline: Stable Diffusion 1 and 2, SDXL base, SDXL refiner.
_PIPELINES: dict[tuple[str, ...], Config] = {
    (): _STABLE_DIFFUSION,
    ("text",): _STABLE_DIFFUSION,
    ("text", "text_2"): {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
    },
    ("text_2",): {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    },
}


def _write_json(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
