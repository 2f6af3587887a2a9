"""What a file of weights is: the networks that it holds, their prefixes and their families."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diffusion_jax.convert.weights.names import NAME_MAPS
from diffusion_jax.convert.weights.reading import diffusers_components, open_weights
from diffusion_jax.convert.weights.tables import EMA

Shapes = Mapping[str, tuple[int, ...]]

# For each NameMap a name, without prefix, that no other network has.
MARKERS = {
    "unet_ldm": r"input_blocks\.0\.0\.weight",
    "unet_diffusers": r"time_embedding\.linear_1\.weight",
    "vae_ldm": r"decoder\.mid\.block_1\.norm1\.weight",
    "vae_diffusers": r"decoder\.mid_block\.resnets\.0\.norm1\.weight",
    "clip_text_hf": r"(?:text_model\.)?embeddings\.token_embedding\.weight",
    "clip_text_open": r"(?<!visual\.)transformer\.resblocks\.0\.ln_1\.weight",
    "clip_vision_hf": r"(?:vision_model\.)?embeddings\.class_embedding",
    "clip_vision_open": r"(?<=visual\.)transformer\.resblocks\.0\.ln_1\.weight",
}
# The usual prefixes of released checkpoints; the first one that a file has is taken.
PREFIXES = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
}


# Files beside a model, which are not read here, and a part of a name that each of them has.
OTHERS = {
    "a LoRA": "lora_",
    "a ControlNet": "input_hint_block.",
    "a ControlNet of diffusers": "controlnet_cond_embedding.",
    "a textual inversion": "emb_params",
    "a textual inversion of PyTorch": "string_to_param",
}


class FoundNetwork(NamedTuple):
    """A network in a file: its kind, the name of its NameMap, and the prefix of its names."""

    kind: str
    name_map: str
    prefix: str


class Family(NamedTuple):
    """UNets of one origin: their name, what to call them, context width and input channels."""

    name: str
    words: str
    context: int | None
    in_channels: int | None


FAMILIES = (
    Family("v1", "a Stable Diffusion 1 UNet", 768, 4),
    Family("v1_inpainting", "a Stable Diffusion 1 inpainting UNet", 768, 9),
    Family("v1_edit", "an InstructPix2Pix UNet", 768, 8),
    Family("v2", "a Stable Diffusion 2 UNet", 1024, 4),
    Family("v2_inpainting", "a Stable Diffusion 2 inpainting UNet", 1024, 9),
    Family("v2_depth", "a Stable Diffusion 2 depth UNet", 1024, 5),
    Family("upscale", "a Stable Diffusion 2 x4 upscaler UNet", 1024, 7),
    Family("xl_base", "an SDXL base UNet", 2048, 4),
    Family("xl_inpainting", "an SDXL inpainting UNet", 2048, 9),
    Family("text2img_1p4b", "a latent diffusion 1.4B text-to-image UNet", 1280, 4),
)
REFINER = Family("xl_refiner", "an SDXL refiner UNet", 1280, 4)
VIDEO = Family("video", "a video UNet", None, None)
_VECTOR = re.compile(r"(label_emb|add_embedding)\.")
_TEXT = re.compile(r"attn2\.to_k\.weight$")
_INPUT = re.compile(r"(^|\.)(input_blocks\.0\.0|conv_in)\.weight$")


def find_networks(names: Iterable[str]) -> list[FoundNetwork]:
    """Find the networks that a file holds, by their markers."""
    names = list(names)
    found = []
    for name_map, marker in MARKERS.items():
        pattern = re.compile(rf"^((?:.*?\.)??){marker}$")
        prefixes = sorted({match[1] for name in names if (match := pattern.match(name))})
        kind = NAME_MAPS[name_map].kind
        found += [FoundNetwork(kind, name_map, prefix) for prefix in prefixes]
    return found


def find_network(
    names: Iterable[str], kind: str, path: object = "the file", number: int | None = None
) -> FoundNetwork:
    """Find one network of a kind ("unet", "vae", "clip text", "clip vision") in a file.

    number: which of them, counted from 0 in the order of their prefixes; None for the only one, or
    the one with a usual prefix.
    Raises ValueError, saying what the file holds instead, when it does not hold that network.
    """
    names = list(names)
    found = find_networks(names)
    fits = sorted((n for n in found if n.kind == kind), key=lambda n: n.prefix)
    if number is not None and number < len(fits):
        return fits[number]
    if number:
        raise ValueError(
            f"{path} holds {len(fits)} networks of the kind {kind!r}, and number {number + 1} is "
            "needed"
        )
    usual = [n for prefix in PREFIXES.get(kind, ()) for n in fits if n.prefix == prefix]
    if usual or len(fits) == 1:
        return (usual or fits)[0]
    if fits:
        places = ", ".join(repr(network.prefix) for network in fits)
        raise ValueError(f"{path} holds several networks of kind {kind}: give prefix, of {places}")
    places = [f"a {n.kind} under {n.prefix!r}" if n.prefix else f"a {n.kind}" for n in found]
    other = [words for words, part in OTHERS.items() if any(part in name for name in names)]
    held = ", ".join(places or other[:1]) or "no network that is known here"
    raise ValueError(f"{path} holds no {kind}, but {held}")


def describe_weights(path: str | os.PathLike) -> list[str]:
    """Say in a line for each network of a file or folder what it is, where, and in which names.

    Raises what open_weights raises.
    """
    lines, parts = [], diffusers_components(path)
    for part in parts or [None]:
        tensors = open_weights(path, part).tensors
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        for found in find_networks(shapes):
            under = {k: v for k, v in shapes.items() if k.startswith(found.prefix)}
            what = unet_family(under).words if found.kind == "unet" else found.kind
            place = f" in {part}" if part else f" under {found.prefix!r}" if found.prefix else ""
            lines.append(f"{what}{place}, in the names of {found.name_map}")
        averages = sum(name.startswith(EMA) for name in shapes)
        lines += [f"{averages} averages (EMA)"] if averages else []
    return lines


def unet_family(shapes: Shapes) -> Family:
    """Recognise a released UNet by the shapes of its tensors.

    shapes: {name: shape}, in the names of latent-diffusion or diffusers.
    A UNet that is in no row of FAMILIES gets the family "other", and its widths as the words.
    Source of the idea: diffusers, single_file_utils.CHECKPOINT_KEY_NAMES.
    """
    inputs = [shape[1] for name, shape in shapes.items() if _INPUT.search(name)]
    contexts = {shape[1] for name, shape in shapes.items() if _TEXT.search(name)}
    context = max(contexts) if contexts else None
    in_channels = inputs[0] if inputs else None
    if any(".time_stack." in name or ".temporal_" in name for name in shapes):
        return VIDEO._replace(context=context, in_channels=in_channels)
    vector = any(_VECTOR.search(name) for name in shapes)
    if vector and (context, in_channels) == (REFINER.context, REFINER.in_channels):
        return REFINER
    for family in FAMILIES:
        if (family.context, family.in_channels) == (context, in_channels):
            return family
    text = f"text of width {context}" if context else "no text"
    return Family("other", f"a UNet for {in_channels} channels and {text}", context, in_channels)
