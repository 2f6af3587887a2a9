"""Configs of generative-models (SDXL, SD 2.1, the examples of training) -> sections of ours."""

from diffusion_jax.convert.yaml import tables
from diffusion_jax.convert.yaml.conditioning import (
    TEXTS,
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
from diffusion_jax.convert.yaml.parts import (
    Sections,
    convert_denoiser,
    convert_first_stage,
    convert_loss,
    convert_sampler,
    convert_unet,
)
from diffusion_jax.convert.yaml.reading import NUMBER, Node
from diffusion_jax.convert.yaml.rows import convert_class, convert_options
from diffusion_jax.convert.yaml.training import (
    Picture,
    convert_data,
    convert_loop,
    convert_optimizers,
    convert_trainer,
)
from diffusion_jax.convert.yaml.video import (
    VIDEO_EMBEDDERS,
    choose_frame_dropout,
    concat_channels,
    convert_video_embedder,
    frames_of,
    video_source,
)


def convert_engine(root: Node) -> Sections:
    """Convert a config whose model is a DiffusionEngine.

    Raises ValueError for a config without a network or a denoiser.
    """
    model = root.child("model")
    params = model.child("params")
    model.target()
    params.need("network_config", "denoiser_config")
    network = convert_unet(params.child("network_config"), ldm=False)
    frames = frames_of(params)
    stage = _first_stage(params)
    found = _embedders(params.child("conditioner_config"), frames)
    _check_channels(params.child("network_config").child("params"), stage, found)
    found = choose_dropout(root, found, is_ldm=False)
    found = found if frames is None else choose_frame_dropout(root, found)
    trainer = convert_trainer(root)
    channels = network.get("out_channels", 3) if stage is None else stage.get("in_channels", 3)
    has_sizes = any(one.name == "original_size" for one in found)
    clips = None if frames is None else video_source(found, frames)
    picture = Picture(None, channels, has_captions(found), has_sizes, frames, clips)
    data = convert_data(root.child("data"), picture)
    denoising = _denoising(params, is_guidable(found))
    decay = params.take("ema_decay_rate", 0.9999)
    decay = decay if params.take("use_ema", False) else None
    optimizers = convert_optimizers(model, params, trainer, decay)
    loop = convert_loop(root, trainer, is_ldm=False)
    convert_options(params, tables.ENGINE_OTHER)
    for key in ("N_TIME", "N_VIEW", "N_FRAMES"):
        root.take(key, None)  # SV4D refers to them where they matter
    return {
        "data": data,
        "first_stage": stage,
        "conditioning": conditioning_section(found),
        "model": network | trainer.dtype,
        **denoising,
        **optimizers,
        **loop,
    }


def _first_stage(params: Node) -> Sections | None:
    stage = convert_first_stage(params.child("first_stage_config"))
    scale: Sections = {"scale_factor": params.take("scale_factor", 1.0, NUMBER)}
    if params.take("disable_first_stage_autocast", False):
        scale["dtype"] = "float32"
    return None if stage is None else insert(stage, scale)


def _embedders(conditioner: Node, frames: int | None) -> Embedders:
    if not conditioner.values:
        return []
    conditioner.expect("GeneralConditioner", "it is read as GeneralConditioner")
    found: list[ConvertedEmbedder] = []
    for node in conditioner.child("params").children("emb_models"):
        node.note("input_keys", "an embedder has one input here")
        use = Use(
            node.take("input_key", "txt", str),
            node.take("is_trainable", False),
            node.take("ucg_rate", None, NUMBER),
            node.take("legacy_ucg_value", None),
            (node, "is_trainable"),
            False,
        )
        if node.class_name() in VIDEO_EMBEDDERS:
            found += convert_video_embedder(node, use)
            continue
        own = convert_embedder(node, use, frames)
        if use.null_value is not None and own:
            if own[0].section["name"] not in (*TEXTS, "class_embedding"):
                node.note("legacy_ucg_value", "what is dropped becomes zero")
        found += own
    return found


def _check_channels(network: Node, stage: Sections | None, found: Embedders) -> None:
    channels = (stage or {}).get("embed_dim", network.peek("out_channels"))
    channels = None if channels is None else channels + concat_channels(found)
    if network.take("in_channels", channels) != channels:
        network.note("in_channels", f"{channels} channels are denoised; add an embedder for more")


def _denoising(params: Node, can_guide: bool) -> Sections:
    """Convert denoiser, loss and sampler; a YAML that only describes a model has no loss."""
    denoiser = params.child("denoiser_config")
    noise = convert_denoiser(denoiser)
    sections: Sections = dict(noise.sections)
    if params.has("loss_fn_config"):
        sections |= convert_loss(params.child("loss_fn_config"), noise)
    else:
        sections["loss"] = {"name": "denoiser"}
        params.chosen.append(
            "the loss is the error of the network's own output, the same at all noise levels"
        )
        params.take("loss_fn_config", None)
    old = denoiser.child("params").child("weighting_config")
    if old.values:
        weighting = convert_class(old, tables.WEIGHTINGS, "weighting")
        sections |= {} if weighting is None else {"weighting": weighting}
    sampler: Sections = {"name": "euler", "num_steps": 50}
    guidance: Sections = {"name": "cfg", "scale": 5.0} if can_guide else {"name": "none"}
    sections |= {"sampler": sampler, "guidance": guidance}
    if not params.has("sampler_config"):
        how = f", guided by {guidance['scale']}" if can_guide else ""
        params.chosen.append(f"samples are drawn by Euler's method, in 50 steps{how}")
        return sections
    sections |= convert_sampler(params.child("sampler_config"), noise)
    sections["sampler"].setdefault("num_steps", 50)
    if sections["guidance"]["name"] == "cfg" and not can_guide:
        sections["guidance"] = {"name": "none"}
        options = params.child("sampler_config").child("params")
        options.note("guider_config", "no embedder has a ucg_rate, so nothing is there to guide")
    return sections
