"""Configs of generative-models (SDXL, SD 2.1, the examples of training) -> sections of ours."""

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
    Noise,
    Sections,
    convert_denoiser,
    convert_first_stage,
    convert_loss,
    convert_sampler,
    convert_scheduler,
    convert_unet,
)
from diffusion_jax.convert.yaml.reading import NUMBER, Node
from diffusion_jax.convert.yaml.rows import convert_class, convert_options
from diffusion_jax.convert.yaml.training import (
    Picture,
    convert_data,
    convert_loop,
    convert_optimizer,
    convert_trainer,
)


def convert_engine(root: Node) -> tuple[Sections, list[str]]:
    """Convert a config whose model is a DiffusionEngine; returns what was chosen, too.

    Raises ValueError for a config without a network or a denoiser.
    """
    model = root.child("model")
    params = model.child("params")
    model.target()
    for key in ("network_config", "denoiser_config"):
        if not params.has(key):
            raise ValueError(f"{params.at(key)} is missing from the YAML")
    sections: Sections = {"seed": 0}
    network = convert_unet(params.child("network_config"), ldm=False)
    stage = _first_stage(params)
    found = _embedders(params.child("conditioner_config"))
    _check_channels(params.child("network_config").child("params"), stage)
    found, chosen = choose_dropout(found, is_ldm=False)
    notes = [] if chosen is None else [chosen]
    trainer = convert_trainer(root)
    if trainer.half_precision:
        network["dtype"] = "bfloat16"
    picture = _picture(network, stage, found)
    sections["data"], chosen = convert_data(root.child("data"), picture)
    notes += [] if chosen is None else [chosen]
    sections |= {} if stage is None else {"first_stage": stage}
    sections |= {"conditioning": conditioning_section(found), "model": network}
    denoising, more = _denoising(params, found)
    sections |= denoising
    rate = model.take("base_learning_rate", 1e-5, NUMBER)
    if not model.has("base_learning_rate"):
        more.append("the learning rate is 1e-5")
    decay = params.take("ema_decay_rate", 0.9999)
    decay = decay if params.take("use_ema", False) else None
    sections["optimizer"] = convert_optimizer(
        params.child("optimizer_config"), rate, decay, trainer.clip_norm
    )
    sections["lr_schedule"] = convert_scheduler(params.child("scheduler_config"))
    loop, chosen_too = convert_loop(root, trainer, None, None)
    loop["train"]["ckpt_path"] = params.take("ckpt_path", None)
    convert_options(params, tables.ENGINE_OTHER)
    return sections | loop, notes + more + chosen_too


def _first_stage(params: Node) -> Sections | None:
    stage = convert_first_stage(params.child("first_stage_config"))
    scale = params.take("scale_factor", 1.0, NUMBER)
    full = params.take("disable_first_stage_autocast", False)
    if stage is None:
        return None
    weights = stage.pop("weights")
    dtype = {"dtype": "float32"} if full else {}
    return stage | {"scale_factor": scale} | dtype | {"weights": weights}


def _embedders(conditioner: Node) -> list[Found]:
    if not conditioner.values:
        return []
    if conditioner.target("GeneralConditioner") != "GeneralConditioner":
        conditioner.note("target", "it is read as GeneralConditioner")
    params = conditioner.child("params")
    found = []
    for node in params.children("emb_models"):
        node.note("input_keys", "an embedder has one input here")
        rate, null = node.take("ucg_rate", None, NUMBER), node.take("legacy_ucg_value", None)
        use = Use(
            node.take("input_key", "txt", str),
            node.take("is_trainable", False),
            rate,
            null,
            (node, "is_trainable"),
            False,
        )
        one = convert_embedder(node, use)
        if one is None:
            continue
        if null is not None and one.section["name"] not in (*TEXTS, "class_embedding"):
            node.note("legacy_ucg_value", "what is dropped becomes zero")
        found.append(one)
    return found


def _check_channels(network: Node, stage: Sections | None) -> None:
    channels = network.peek("out_channels")
    if stage is not None and "embed_dim" in stage:
        channels = stage["embed_dim"]
    if network.take("in_channels", channels) != channels:
        network.note("in_channels", f"{channels} channels are denoised; add an embedder for more")


def _picture(network: Sections, stage: Sections | None, found: list[Found]) -> Picture:
    channels = network["out_channels"] if "out_channels" in network else 3
    if stage is not None:
        channels = stage["in_channels"] if "in_channels" in stage else 3
    has_captions = any(one.section["name"] in TEXTS for one in found)
    return Picture(None, channels, has_captions, any(o.name == "original_size" for o in found))


def _denoising(params: Node, found: list[Found]) -> tuple[Sections, list[str]]:
    """Convert denoiser, loss and sampler; a YAML that only describes a model has no loss."""
    noise: Noise = convert_denoiser(params.child("denoiser_config"))
    sections: dict[str, Any] = dict(noise.sections)
    chosen: list[str] = []
    old = params.child("denoiser_config").child("params")
    if params.has("loss_fn_config"):
        sections |= convert_loss(params.child("loss_fn_config"), noise)
    else:
        sections["loss"] = {"name": "denoiser"}
        chosen.append("the loss is that of the network's own output, at all noise levels alike")
        params.take("loss_fn_config", None)
    if old.has("weighting_config"):
        weighting = convert_class(old.child("weighting_config"), tables.WEIGHTINGS, "weighting")
        sections |= {} if weighting is None else {"weighting": weighting}
    guides = any("ucg_rate" in one.section and one.section["ucg_rate"] > 0 for one in found)
    default = {"name": "cfg", "scale": 5.0} if guides else {"name": "none"}
    sections["sampler"] = {"name": "euler", "num_steps": 50}
    sections["guidance"] = default
    if params.has("sampler_config"):
        sections |= convert_sampler(params.child("sampler_config"), noise)
        if "num_steps" not in sections["sampler"]:
            sections["sampler"]["num_steps"] = 50
        if sections["guidance"]["name"] == "cfg" and not guides:
            sections["guidance"] = {"name": "none"}
            sampler = params.child("sampler_config").child("params")
            sampler.note(
                "guider_config", "no embedder has a ucg_rate, so nothing is there to guide"
            )
    else:
        how = f", guided by {default['scale']}" if guides else ""
        chosen.append(f"samples are drawn by Euler's method, in 50 steps{how}")
    return sections, chosen
