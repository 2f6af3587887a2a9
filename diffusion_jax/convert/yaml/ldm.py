"""Configs of latent-diffusion, Stable Diffusion 1 and 2 -> sections of ours."""

import re
from collections.abc import Mapping
from typing import Any

from diffusion_jax.convert.yaml import tables
from diffusion_jax.convert.yaml.conditioning import (
    TEXTS,
    Found,
    Use,
    choose_dropout,
    conditioning_section,
    convert_embedder,
)
from diffusion_jax.convert.yaml.parts import (
    Sections,
    convert_first_stage,
    convert_scheduler,
    convert_unet,
)
from diffusion_jax.convert.yaml.reading import NUMBER, Node
from diffusion_jax.convert.yaml.rows import convert_options
from diffusion_jax.convert.yaml.training import (
    Picture,
    convert_data,
    convert_loop,
    convert_optimizer,
    convert_trainer,
    sampling_of_pictures,
)

DDPM_CLASSES = ("DDPM", "LatentDiffusion")
# What subclasses of LatentDiffusion add to it.
SUBCLASSES = {
    "LatentInpaintDiffusion": "batches must carry the mask and the masked latents themselves",
    "LatentDepth2ImageDiffusion": "batches must carry the depth themselves",
    "LatentUpscaleDiffusion": "the level of the noise on the small image is no condition here",
    "LatentUpscaleFinetuneDiffusion": "the level of the noise on the image is no condition here",
    "ImageEmbeddingConditionedLatentDiffusion": "image embeddings with noise are no condition here",
    "LatentFinetuneDiffusion": "train.keep_dims says how many input channels are kept",
    "Layout2ImgDiffusion": "boxes are no condition here",
}
SENTINELS = ("__is_unconditional__", "__is_first_stage__")


def convert_ldm(root: Node) -> tuple[Sections, list[str]]:
    """Convert a config whose model is a DDPM or a LatentDiffusion; returns what was chosen, too.

    Raises ValueError for a config without a network.
    """
    model = root.child("model")
    kind, params = model.target(), model.child("params")
    if kind not in DDPM_CLASSES:
        model.note("target", f"{kind}: {SUBCLASSES[kind]}")
    is_latent = kind != "DDPM"
    sections: Sections = {"seed": 0}
    if not params.has("unet_config"):
        raise ValueError(f"{params.at('unet_config')} is missing from the YAML")
    unet = params.child("unet_config")
    network = convert_unet(unet, ldm=True)
    stage = _first_stage(params) if is_latent else None
    found, chosen = _conditioning(params, unet, stage, is_latent)
    conditioning = conditioning_section(found)
    _check_key(params, conditioning["key"], is_latent)
    trainer = convert_trainer(root)
    if trainer.half_precision:
        network["dtype"] = "bfloat16"
    has_captions = any(one.section["name"] in TEXTS for one in found)
    picture = _picture(params, stage, has_captions)
    sections["data"], more = convert_data(root.child("data"), picture)
    chosen += [more] if more else []
    side = sections["data"]["batches"]["image_size"]
    if picture.image_size not in (None, side):
        params.note(
            "image_size", f"images of the data have {side} pixels, which is what counts here"
        )
    sections |= {} if stage is None else {"first_stage": stage}
    sections |= {"conditioning": conditioning, "model": network}
    schedule = convert_options(params, tables.SCHEDULE)
    sections |= {"schedule": schedule}
    sections["loss"] = {"name": "ddpm"} | convert_options(params, tables.DDPM_LOSS)
    sampling, more = _sampling(root, params, found, schedule["num_timesteps"], is_latent)
    sections |= sampling
    chosen += more
    use_ema = params.take("use_ema", True)
    rate = model.take("base_learning_rate", 1e-5, NUMBER)
    if not model.has("base_learning_rate"):
        chosen.append("the learning rate is 1e-5")
    optimizer = params.child("optimizer_config")
    decay = 0.9999 if use_ema else None
    sections["optimizer"] = convert_optimizer(optimizer, rate, decay, trainer.clip_norm)
    sections["lr_schedule"] = convert_scheduler(params.child("scheduler_config"))
    monitor = _monitor(params, use_ema, trainer.is_validated)
    loop, more = convert_loop(root, trainer, monitor, params.take("log_every_t", None))
    # Their main.py scales the rate by the samples of an update unless --scale_lr=False.
    if trainer.batch_size is not None:
        loop["train"]["scale_lr"] = True
    loop["train"] |= _warm_start(params)
    convert_options(params, tables.DDPM_OTHER)
    return sections | loop, chosen + more


def _first_stage(params: Node) -> Sections | None:
    stage = convert_first_stage(params.child("first_stage_config"))
    scale = params.take("scale_factor", 1.0, NUMBER)
    by_std = params.take("scale_by_std", False, bool)
    scaling = {"scale_by_std": True} if by_std and scale == 1.0 else {"scale_factor": scale}
    if by_std and scale != 1.0:
        params.note("scale_by_std", f"scale_factor = {scale} is what is used")
    return None if stage is None else _before_last(stage, scaling)


def _before_last(stage: Sections, more: Mapping[str, Any]) -> Sections:
    weights = {"weights": stage["weights"]}
    return {k: v for k, v in stage.items() if k != "weights"} | dict(more) | weights


def _conditioning(
    params: Node, unet: Node, stage: Sections | None, is_latent: bool
) -> tuple[list[Found], list[str]]:
    """Find the embedder of the cond_stage_config, and the image that widens the first layer."""
    found: list[Found] = []
    key = params.peek("cond_stage_key", "image")
    value = params.values["cond_stage_config"] if params.has("cond_stage_config") else SENTINELS[0]
    has_own = isinstance(value, Mapping)
    if has_own and not params.child("cond_stage_config").target().endswith("Identity"):
        rates = params.child("ucg_training")
        own = rates.child(key)
        trainable = params.take("cond_stage_trainable", False)
        rate = own.take("p", 0.0, NUMBER) if own.values else None
        null = own.take("val", "") if own.values else None
        use = Use(key, trainable, rate, null, (params, "cond_stage_trainable"), True)
        one = convert_embedder(params.child("cond_stage_config"), use)
        found += [] if one is None else [one]
    params.take("cond_stage_key", None)
    params.take("cond_stage_trainable", None)
    if not has_own:
        params.take("cond_stage_config", None)
        if value == SENTINELS[0]:
            for unused in ("cond_stage_key", "concat_mode"):
                params.note(unused, "not needed: the model is unconditional")
        if value not in SENTINELS:
            params.note("cond_stage_config", f"{value!r} is unknown here")
    if found and found[0].section["name"] == "spatial_rescaler" and stage is not None:
        params.child("cond_stage_config").note(
            "target", "its input has the sides of the latents here, those of the image there"
        )
    network = unet.child("params")
    channels = _channels(params, network, stage, is_latent)
    found += _concatenated(network, found, key, channels)
    if has_own and not found:
        own = params.child("cond_stage_config")
        reason = (
            "a condition that is not embedded: add an embedder named 'features', with its shape"
        )
        own.notes.setdefault(own.at("target"), reason)
    found, chosen = choose_dropout(found, is_ldm=True)
    if (
        chosen is None
        and not params.has("ucg_training")
        and found
        and "ucg_rate" in found[0].section
    ):
        chosen = "a tenth of the labels is dropped in training, for the null class"
    return found, [] if chosen is None else [chosen]


def _channels(params: Node, network: Node, stage: Sections | None, is_latent: bool) -> int:
    """Tell how many channels are denoised; note a `channels` that says something else."""
    channels = network.peek("out_channels", 3)
    if stage is not None and "embed_dim" in stage:
        channels = stage["embed_dim"]
    if params.take("channels", channels) != channels:
        what = "the latents" if is_latent else "the network's output"
        params.note("channels", f"{what} has {channels} channels, which is what counts here")
    return channels


def _concatenated(network: Node, found: list[Found], key: str, channels: int) -> list[Found]:
    """Make an embedder of the channels that the network reads beside what it denoises."""
    extra = network.take("in_channels", channels, int) - channels
    for one in found:
        if one.section["name"] == "spatial_rescaler":
            own = one.section
            extra -= own["out_channels"] if "out_channels" in own else own["channels"]
    if extra == 0:
        return []
    if extra < 0:
        network.note("in_channels", f"it should be {channels}, the channels of what is denoised")
        return []
    name = re.sub(r"\W", "_", key) if key not in tables.INPUTS else "concat"
    network.note(
        "in_channels",
        f"{extra} channels beside what is denoised: batches must carry {name!r}, at its resolution",
    )
    section = {"name": "concat_image", "input_key": name, "channels": extra}
    return [Found(name, section, ("concat",))]


def _check_key(params: Node, key: str, is_latent: bool) -> None:
    concat = params.take("concat_mode", True)
    default = "concat" if concat else "crossattn"
    asked = params.take("conditioning_key", default if is_latent else None)
    if params.has("conditioning_key"):
        params.note("concat_mode", "not needed: conditioning_key decides")
    if key != (asked or "none") and params.has("conditioning_key"):
        params.note("conditioning_key", f"the embedders that we have give {key!r}")


def _picture(params: Node, stage: Sections | None, has_captions: bool) -> Picture:
    side = params.take("image_size", None, int)
    if stage is None:
        channels = params.child("unet_config").child("params").peek("out_channels", 3)
        return Picture(side, channels, has_captions, False)
    ch_mult = stage["ch_mult"] if "ch_mult" in stage else (1, 2, 4, 8)
    channels = stage["in_channels"] if "in_channels" in stage else 3
    return Picture(
        None if side is None else side * 2 ** (len(ch_mult) - 1), channels, has_captions, False
    )


def _sampling(
    root: Node, params: Node, found: list[Found], num_timesteps: int, is_latent: bool
) -> tuple[Sections, list[str]]:
    given = sampling_of_pictures(root)
    sampler: Sections = {"name": "ddim", "num_steps": 50}
    if is_latent:
        params.note("clip_denoised", "not needed: what is predicted is never clipped in latents")
    else:
        clip = params.take("clip_denoised", True)
        sampler = {"name": "ddpm", "num_steps": num_timesteps, "clip_denoised": clip}
    sampler |= {key: given[key] for key in ("num_steps", "eta") if key in given and is_latent}
    can_guide = any("ucg_rate" in one.section and one.section["ucg_rate"] > 0 for one in found)
    how = f"samples are drawn by {sampler['name']}, in {sampler['num_steps']} steps"
    if not can_guide:
        return {"sampler": sampler, "guidance": {"name": "none"}}, [how] if not given else []
    is_text = any(one.section["name"] in TEXTS for one in found)
    scale = given["scale"] if "scale" in given else (7.5 if is_text else 3.0)
    guidance = {"name": "cfg", "scale": scale}
    chosen = [] if given else [f"{how}, guided by {scale}"]
    return {"sampler": sampler, "guidance": guidance}, chosen


def _monitor(params: Node, use_ema: bool, is_validated: bool) -> str | None:
    monitor = params.take("monitor", "val/loss", str)
    if not is_validated:
        params.note(
            "monitor",
            "there is no validation: set data.splits.validation, hooks.validation and "
            "checkpoint.keep_best first",
        )
        return None
    return monitor if use_ema else monitor.removesuffix("_ema")


def _warm_start(params: Node) -> Sections:
    ignored = params.take("ignore_keys", (), tuple)
    found: Sections = {"ckpt_path": params.take("ckpt_path", None)}
    if ignored:
        found["ignore_keys"] = tuple(re.escape(str(name)) for name in ignored)
    if params.take("load_only_unet", False):
        found["load_only_unet"] = True
    return found
