"""Configs of latent-diffusion, Stable Diffusion 1 and 2 -> sections of ours."""

import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.convert.yaml import tables
from diffusion_jax.convert.yaml.conditioning import (
    ConvertedEmbedder,
    Embedders,
    Use,
    choose_dropout,
    conditioning_section,
    convert_embedder,
    has_captions,
    insert,
    is_guidable,
)
from diffusion_jax.convert.yaml.parts import Sections, convert_first_stage, convert_unet
from diffusion_jax.convert.yaml.reading import NUMBER, Node
from diffusion_jax.convert.yaml.rows import convert_options
from diffusion_jax.convert.yaml.training import (
    Picture,
    convert_data,
    convert_loop,
    convert_optimizers,
    convert_trainer,
    sampling_of_pictures,
)

DDPM_CLASSES = ("DDPM", "LatentDiffusion")
# Subclasses of LatentDiffusion, and what each adds that has no counterpart.
SUBCLASSES = {
    "LatentInpaintDiffusion": "data.batches.masks makes the masks of training",
    "LatentDepth2ImageDiffusion": "batches must carry the depth themselves",
    "LatentUpscaleDiffusion": "batches must carry the small image under noise, and its level",
    "LatentUpscaleFinetuneDiffusion": "batches must carry the image under noise, and its level",
    "ImageEmbeddingConditionedLatentDiffusion": "batches must carry image embeddings under noise",
    "LatentFinetuneDiffusion": "train.keep_dims says how many input channels are kept",
    "Layout2ImgDiffusion": "boxes are no condition here",
}
# The embedders of an inpainting model in the order of their channels, and the masks that train it.
_MASKED: dict[str, dict[str, Any]] = {
    "mask": {"name": "inpainting_mask"},
    "masked_image": {"name": "image_latents", "input_key": "masked_image"},
}
_MASKS = ("boxes", "strokes", "strokes", "everything")
SENTINELS = ("__is_unconditional__", "__is_first_stage__")


def convert_ldm(root: Node) -> Sections:
    """Convert a config whose model is a DDPM or a LatentDiffusion.

    Raises ValueError for a config without a network.
    """
    model = root.child("model")
    kind, params = model.target(), model.child("params")
    if kind not in DDPM_CLASSES:
        model.note("target", f"{kind}: {SUBCLASSES[kind]}")
    is_latent = kind != "DDPM"
    params.need("unet_config")
    unet = params.child("unet_config")
    network = convert_unet(unet, ldm=True)
    stage = _first_stage(params) if is_latent else None
    completes = kind == "LatentInpaintDiffusion"
    found = _conditioning(params, unet.child("params"), stage, is_latent, completes)
    conditioning = conditioning_section(found)
    _check_key(params, conditioning["key"], is_latent)
    trainer = convert_trainer(root)
    picture = _picture(params, stage, has_captions(found))
    data = convert_data(root.child("data"), picture)
    data["batches"] |= {"masks": _MASKS} if completes else {}
    side = data["batches"]["image_size"]
    if picture.image_size not in (None, side):
        params.note(
            "image_size", f"images of the data have {side} pixels, which is what counts here"
        )
    schedule = convert_options(params, tables.SCHEDULE)
    loss = {"name": "ddpm"} | convert_options(params, tables.DDPM_LOSS)
    sampling = _sampling(root, params, found, schedule["num_timesteps"], is_latent)
    use_ema = params.take("use_ema", True)
    optimizers = convert_optimizers(model, params, trainer, 0.9999 if use_ema else None)
    monitor = _monitor(params, use_ema, trainer.is_validated)
    every = params.take("log_every_t", None)
    loop = convert_loop(root, trainer, monitor, every, is_ldm=True)
    loop["train"] |= _warm_start(params)
    convert_options(params, tables.DDPM_OTHER)
    return {
        "data": data,
        "first_stage": stage,
        "conditioning": conditioning,
        "model": network | trainer.dtype,
        "schedule": schedule,
        "loss": loss,
        **sampling,
        **optimizers,
        **loop,
    }


def _first_stage(params: Node) -> Sections | None:
    stage = convert_first_stage(params.child("first_stage_config"))
    scale = params.take("scale_factor", 1.0, NUMBER)
    by_std = params.take("scale_by_std", False, bool)
    scaling = {"scale_by_std": True} if by_std and scale == 1.0 else {"scale_factor": scale}
    if by_std and scale != 1.0:
        params.note("scale_by_std", f"scale_factor = {scale} is what is used")
    return None if stage is None else insert(stage, scaling)


def _conditioning(
    params: Node, network: Node, stage: Sections | None, is_latent: bool, completes: bool
) -> Embedders:
    """Find the embedder of the cond_stage_config, and the image that widens the first layer."""
    key = params.take("cond_stage_key", "image", str)
    trainable = params.take("cond_stage_trainable", False)
    value = params.peek("cond_stage_config", SENTINELS[0])
    own = params.child("cond_stage_config") if isinstance(value, Mapping) else None
    found: list[ConvertedEmbedder] = []
    if own is None:
        params.take("cond_stage_config", None)
        if value not in SENTINELS:
            params.note("cond_stage_config", f"{value!r} is unknown here")
        elif value == SENTINELS[0]:
            for unused in ("cond_stage_key", "concat_mode"):
                params.note(unused, "not needed: the model is unconditional")
    elif own.class_name().endswith("Identity"):
        own.target()
    else:
        dropout = params.child("ucg_training").child(key)
        rate = dropout.take("p", 0.0, NUMBER) if dropout.values else None
        null = dropout.take("val", "") if dropout.values else None
        use = Use(key, trainable, rate, null, (params, "cond_stage_trainable"), True)
        found = convert_embedder(own, use)
    rescaled = [one.section for one in found if one.section["name"] == "spatial_rescaler"]
    if rescaled and own is not None:
        for name in ("in_channels", "out_channels"):
            own.child("params").take(name, None, int)
    channels = _channels(params, network, stage, is_latent)
    taken = channels + sum(one.get("out_channels", one["channels"]) for one in rescaled)
    key = params.take("low_scale_key", key, str)
    if completes:
        found += [ConvertedEmbedder(name, row, ("concat",)) for name, row in _MASKED.items()]
        taken += 1 + channels
    found += _concatenated(network, key, channels, taken) + _labels(params, network)
    if own is not None and not found:
        own.notes.setdefault(
            own.at("target"),
            "a condition that is not embedded: add an embedder named 'features', with its shape",
        )
    if found and "ucg_rate" in found[0].section and not params.has("ucg_training"):
        params.chosen.append("a tenth of the labels is dropped in training, for the null class")
    return choose_dropout(params, found, is_ldm=True)


def _channels(params: Node, network: Node, stage: Sections | None, is_latent: bool) -> int:
    """Tell how many channels are denoised; note a `channels` that says something else."""
    channels = (stage or {}).get("embed_dim", network.peek("out_channels", 3))
    if not isinstance(channels, int):
        raise ValueError(f"{channels!r} channels of latents should be a whole number")
    if params.take("channels", channels) != channels:
        what = "the latents" if is_latent else "the network's output"
        params.note("channels", f"{what} has {channels} channels, which is what counts here")
    return channels


def _concatenated(network: Node, key: str, channels: int, taken: int) -> list[ConvertedEmbedder]:
    """Make an embedder for the input channels of the network that have no source yet."""
    extra = network.take("in_channels", channels, int) - taken
    if extra < 0:
        network.note("in_channels", f"it should be {channels}, the channels of what is denoised")
    if extra <= 0:
        return []
    name = re.sub(r"\W", "_", key) if key not in tables.INPUTS else "concat"
    network.note(
        "in_channels",
        f"{extra} channels beside what is denoised: batches must carry {name!r}, at its resolution",
    )
    section = {"name": "concat_image", "input_key": name, "channels": extra}
    return [ConvertedEmbedder(name, section, ("concat",))]


def _labels(params: Node, network: Node) -> list[ConvertedEmbedder]:
    """Make an embedder for what the network itself takes as y: labels, noise levels or features."""
    rows, width = network.peek("num_classes"), network.peek("adm_in_channels")
    if rows == "sequential" and isinstance(width, int):
        name, section = "image_embedding", {"name": "features", "shape": (width,)}
        params.chosen.append(f"batches must carry {name!r}, vectors of {width} numbers")
    elif isinstance(rows, int) and not isinstance(rows, bool):
        is_level = params.has("low_scale_config") or params.has("noise_level_key")
        name = params.take("noise_level_key", "noise_level" if is_level else "label", str)
        section = {"name": "class_label", "num_classes": rows - 1}
        labels = f"one of {rows - 1} labels; one more is null"
        params.chosen.append(f"batches must carry {name!r}, {labels}")
    else:
        return []
    return [ConvertedEmbedder(name, section | {"input_key": name}, ("vector",))]


def _check_key(params: Node, key: str, is_latent: bool) -> None:
    concat = params.take("concat_mode", True)
    default = "concat" if concat else "crossattn"
    asked = params.take("conditioning_key", default if is_latent else None)
    if params.has("conditioning_key"):
        params.note("concat_mode", "not needed: conditioning_key decides")
    if key != (asked or "none") and params.has("conditioning_key"):
        params.note("conditioning_key", f"the embedders that we have give {key!r}")


def _picture(params: Node, stage: Sections | None, captions: bool) -> Picture:
    side = params.take("image_size", None, int)
    if stage is None:
        network = params.child("unet_config").child("params")
        return Picture(side, network.peek("out_channels", 3), captions)
    widths = stage.get("ch_mult", (1, 2, 4, 8))
    if not isinstance(widths, tuple):
        raise ValueError(f"ch_mult = {widths!r} should be a list of whole numbers")
    halvings = len(widths) - 1
    side = None if side is None else side * 2**halvings
    return Picture(side, stage.get("in_channels", 3), captions)


def _sampling(
    root: Node, params: Node, found: Embedders, num_timesteps: int, is_latent: bool
) -> Sections:
    given = sampling_of_pictures(root)
    if is_latent:
        params.note("clip_denoised", "not needed: what is predicted is never clipped in latents")
        own = {key: given[key] for key in ("num_steps", "eta") if key in given}
        sampler = {"name": "ddim", "num_steps": 50} | own
    else:
        clip = params.take("clip_denoised", True)
        sampler = {"name": "ddpm", "num_steps": num_timesteps, "clip_denoised": clip}
    guidance, how = {"name": "none"}, ""
    if is_guidable(found):
        scale = given.get("scale", 7.5 if has_captions(found) else 3.0)
        guidance, how = {"name": "cfg", "scale": scale}, f", guided by {scale}"
    if not given:
        steps = sampler["num_steps"]
        root.chosen.append(f"samples are drawn by {sampler['name']}, in {steps} steps{how}")
    return {"sampler": sampler, "guidance": guidance}


def _monitor(params: Node, use_ema: bool, is_validated: bool) -> str | None:
    monitor = params.take("monitor", "val/loss", str)
    if is_validated:
        return monitor if use_ema else monitor.removesuffix("_ema")
    params.note(
        "monitor",
        "there is no validation: set data.splits.validation, hooks.validation and "
        "checkpoint.keep_best first",
    )
    return None


def _warm_start(params: Node) -> Sections:
    ignored = params.take("ignore_keys", (), tuple)
    found: Sections = {}
    if ignored:
        found["ignore_keys"] = tuple(re.escape(str(name)) for name in ignored)
    if params.take("load_only_unet", False):
        found["load_only_unet"] = True
    return found
