"""Video models of generative-models (SVD, SV3D, SV4D): the parts that image models do not have."""

from typing import Any

from diffusion_jax.convert.yaml import video_tables as tables
from diffusion_jax.convert.yaml.conditioning import (
    FROZEN_ALL_THE_SAME,
    ConvertedEmbedder,
    Embedders,
    Use,
    insert,
)
from diffusion_jax.convert.yaml.reading import Node
from diffusion_jax.convert.yaml.rows import convert_options
from diffusion_jax.convert.yaml.tables import EMBEDDERS, FROZEN, NO_DOWNLOAD

VIDEO_EMBEDDERS = (tables.CLIP, tables.FRAMES)


def frames_of(params: Node) -> int | None:
    """Find how many frames a clip of a DiffusionEngine has; None for a model of images."""
    if params.child("network_config").class_name() not in tables.NETWORKS:
        return None
    guider = params.child("sampler_config").child("params").child("guider_config")
    num_frames = guider.child("params").take("num_frames", None, int)
    if num_frames is not None:
        return num_frames
    row = tables.GUIDERS.get(guider.class_name())
    frames = tables.FRAMES_OF.get("" if row is None else row.name, 14)
    params.chosen.append(f"clips have {frames} frames")
    return frames


def convert_video_embedder(node: Node, use: Use) -> list[ConvertedEmbedder]:
    """Convert an embedder of a conditioning frame: of its CLIP image, or of its latent."""
    found = _clip(node, use) if node.class_name() == tables.CLIP else _frames(node, use)
    if use.ucg_rate is not None and found:
        found = [
            one._replace(section=insert(one.section, {"ucg_rate": use.ucg_rate})) for one in found
        ]
    return found


def _clip(node: Node, use: Use) -> list[ConvertedEmbedder]:
    node.target()
    params = node.child("params")
    inner = params.child("open_clip_embedding_config")
    inner.expect("FrozenOpenCLIPImageEmbedder", "it is read as FrozenOpenCLIPImageEmbedder")
    options = inner.child("params")
    section: dict[str, Any] = {"name": "open_clip_image", "input_key": use.input_key}
    section |= convert_options(options, EMBEDDERS["FrozenOpenCLIPImageEmbedder"].options)
    count = params.take("n_cond_frames", 1, int)
    section |= {"unsqueeze_dim": True} if count == 1 else {"frames": count}
    convert_options(params, {"n_copies": tables.FRAMES_OPTIONS["n_copies"]})
    name = "open_clip_image"
    options.note("version", NO_DOWNLOAD.format(section=f"conditioning.embedders.{name}"))
    if not options.take("freeze", True):
        section |= {"trainable": True} if use.trainable else {}
        if not use.trainable:
            options.note("freeze", "it is frozen, since it is not said to be trained")
    elif use.trainable:
        node.note("is_trainable", FROZEN_ALL_THE_SAME.format(name=name))
    return [ConvertedEmbedder(name, section | {"weights": None}, ("crossattn",))]


def _frames(node: Node, use: Use) -> list[ConvertedEmbedder]:
    if use.input_key == "cond_motion":
        node.note("target", "it reaches no layer of the network, there neither")
        node.note("params", "it reaches no layer of the network, there neither")
        if use.trainable:
            node.note("is_trainable", "there is nothing to train")
        return []
    node.target()
    params = node.child("params")
    section: dict[str, Any] = {"name": "encoded_frames", "input_key": use.input_key}
    count = params.take("n_cond_frames", 1, int)
    section |= {} if count == 1 else {"frames": count}
    entries = ("concat",)
    if use.input_key == "cond_view":
        section["entry"], entries = "cond_view", ("cond_view",)
    convert_options(params, tables.FRAMES_OPTIONS)
    level = params.child("sigma_cond_config")
    sampler = params.child("sigma_sampler_config")
    sampler.expect("ZeroSampler", "no noise is added here")
    if level.values:
        level.expect("ConcatTimestepEmbedderND", "it is read as ConcatTimestepEmbedderND")
        section["level_dim"] = level.child("params").take("outdim", kind=int)
        entries = (*entries, "vector")
    encoder = params.child("encoder_config")
    encoder.expect("AutoencoderKLModeOnly", "latents are modes here")
    own = encoder.child("params")
    section |= convert_options(own.child("ddconfig"), tables.FRAMES_DDCONFIG)
    own.child("lossconfig").expect("Identity", FROZEN)
    section |= {"trainable": True} if use.trainable else {}
    section |= {"weights": None} | convert_options(own, tables.FRAMES_ENCODER)
    return [ConvertedEmbedder(use.input_key, section, entries)]


def choose_frame_dropout(node: Node, found: Embedders) -> Embedders:
    """Drop conditioning frames in training, all parts together, where the YAML does not say.

    Without dropout there is no unconditional prediction to guide away from; the released models
    have zeros there. The numbers of the vector are the same with and without guidance.
    """
    parts = [one for one in found if one.section["name"] in ("open_clip_image", "encoded_frames")]
    if not parts or any("ucg_rate" in one.section for one in found):
        return found
    node.chosen.append("a tenth of the clips loses its conditioning frames in training, for zeros")
    lost = {"ucg_rate": 0.1, "ucg_group": "frames"}
    return [
        one._replace(section=insert(one.section, lost)) if one in parts else one for one in found
    ]


def video_source(found: Embedders, frames: int) -> dict[str, Any]:
    """Make the source of clips but its folder: videos, or, of several views, objects.

    frames: of a clip, over all views.
    """
    inputs = {one.section["input_key"]: one.section for one in found}
    views = inputs.get("cond_view", {}).get("frames")
    if views is not None:
        return {"name": "view_folder", "num_frames": 2 * (frames // views)}
    has_angles = not inputs.keys().isdisjoint(("polars_rad", "azimuths_rad"))
    source = {"name": "video_folder", "num_frames": frames}
    return source | ({"cameras": True} if has_angles else {})


def concat_channels(found: Embedders) -> int:
    """Count the channels that encoded frames join to the network's input."""
    joined = [one.section for one in found if "concat" in one.entries]
    frames = [section for section in joined if section["name"] == "encoded_frames"]
    return sum(section["z_channels"] for section in frames)
