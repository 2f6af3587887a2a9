"""What a file of weights is: the networks that it holds, their prefixes and their families."""

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from diffusion_jax.convert.weights.names import NAME_MAPS
from diffusion_jax.convert.weights.reading import diffusers_components, open_weights
from diffusion_jax.convert.weights.tables import EMA
from diffusion_jax.wording import counted

Shapes = Mapping[str, tuple[int, ...]]

# For each NameMap a name, without prefix, that no other network has.
MARKERS = {
    "unet_ldm": r"input_blocks\.0\.0\.weight",
    "unet_diffusers": r"time_embedding\.linear_1\.weight",
    "control_ldm": r"input_hint_block\.0\.weight",
    "control_diffusers": r"controlnet_cond_embedding\.conv_in\.weight",
    "dit": r"blocks\.0\.adaLN_modulation\.1\.weight",
    "vae_ldm": r"(?:en|de)coder\.mid\.block_1\.norm1\.weight",
    "vae_diffusers": r"decoder\.mid_block\.resnets\.0\.(?:spatial_res_block\.)?norm1\.weight",
    "clip_text_hf": r"(?:text_model\.)?embeddings\.token_embedding\.weight",
    "clip_text_open": r"(?<!visual\.)transformer\.resblocks\.0\.ln_1\.weight",
    "clip_vision_hf": r"(?:vision_model\.)?embeddings\.class_embedding",
    "clip_vision_open": r"(?<=visual\.)transformer\.resblocks\.0\.ln_1\.weight",
}
# The usual prefixes of released checkpoints; the first one that a file has is taken.
PREFIXES = {
    "unet": ("model.diffusion_model.", "diffusion_model.", "unet.", ""),
    "dit": ("model.diffusion_model.", "diffusion_model.", ""),
    "controlnet": ("control_model.", ""),
    "vae": ("first_stage_model.", "vae.", ""),
}


# Files beside a model, which are no model, and a part of a name that each of them has.
OTHERS = {
    "a LoRA": "lora_",
    "a ControlNet": "input_hint_block.",
    "a ControlNet of diffusers": "controlnet_cond_embedding.",
    "a textual inversion": "emb_params",
    "an IP-Adapter": "ip_adapter.",
    "a LyCORIS": "hada_w1",
    "a LyCORIS by Kronecker products": "lokr_w1",
    "an upscaler (ESRGAN)": "RDB1.conv1",
    "a textual inversion of SDXL": "clip_g",
    "a textual inversion by torch.save": "string_to_param",
}


class FoundNetwork(NamedTuple):
    """A network in a file: its kind, the name of its NameMap, and the prefix of its names."""

    kind: str
    name_map: str
    prefix: str


class HeldNetwork(NamedTuple):
    """A network of a file or folder, and what it is.

    part: the part of a diffusers folder. family: of a UNet. count: how many numbers it has; dtypes:
    their names.
    """

    network: FoundNetwork
    part: str | None
    family: "Family | None"
    count: int
    dtypes: tuple[str, ...]

    @property
    def words(self) -> str:
        """Say what it is, where, and in which names."""
        kind, name_map, prefix = self.network
        what = kind if self.family is None else self.family.words
        place = f" in {self.part}" if self.part else f" under {prefix!r}" if prefix else ""
        return f"{what}{place}, in the names of {name_map}"


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
# Released networks of videos, by the width of their vector and by the blocks over several views.
VIDEO_FAMILIES = {
    (768, "one view"): Family("svd", "a Stable Video Diffusion UNet", 1024, 8),
    (256, "one view"): Family("sv3d_u", "an SV3D UNet without camera poses", 1024, 8),
    (1280, "one view"): Family("sv3d_p", "an SV3D UNet for camera poses", 1024, 8),
    (1280, "views"): Family("sv4d", "an SV4D UNet", 1024, 8),
    (1280, "views and motion"): Family("sv4d2", "an SV4D 2 UNet", 1024, 8),
}
# The kind of network that OTHERS calls by its name.
_BESIDE = "controlnet"
_VECTOR = re.compile(r"(label_emb|add_embedding)\.")
_WIDTH = re.compile(r"(label_emb\.0\.0|add_embedding\.linear_1)\.weight$")
_TIME = re.compile(r"\.(time_stack|time_mix_blocks|temporal_\w+)\.")
_TEXT = re.compile(r"attn2\.to_k\.weight$")
_CONTROL = re.compile(r"((?:.*?\.)??)(?:input_hint_block|controlnet_cond_embedding)\.")
_INPUT = re.compile(r"(^|\.)(input_blocks\.0\.0|conv_in)\.weight$")


def find_networks(names: Iterable[str]) -> list[FoundNetwork]:
    """Find the networks that a file holds, by their markers."""
    names = list(names)
    # A ControlNet begins as a UNet does.
    controls = {match[1] for name in names if (match := _CONTROL.match(name))}
    found = []
    for name_map, marker in MARKERS.items():
        pattern = re.compile(rf"^((?:.*?\.)??){marker}$")
        prefixes = {match[1] for name in names if (match := pattern.match(name))}
        kind = NAME_MAPS[name_map].kind
        prefixes = sorted(prefixes - controls if kind == "unet" else prefixes)
        found += [FoundNetwork(kind, name_map, prefix) for prefix in prefixes]
    return found


def find_network(
    names: Iterable[str], kind: str, path: object = "the file", number: int | None = None
) -> FoundNetwork:
    """Find one network of a kind ("unet", "dit", "vae", "clip text", "clip vision") in a file.

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
            f"{path} holds {counted(len(fits), 'network', 'networks')} of the kind {kind!r}, and "
            f"number {number + 1} is needed"
        )
    usual = [n for prefix in PREFIXES.get(kind, ()) for n in fits if n.prefix == prefix]
    if usual or len(fits) == 1:
        return (usual or fits)[0]
    if fits:
        places = ", ".join(repr(network.prefix) for network in fits)
        raise ValueError(f"{path} holds several networks of kind {kind}: give prefix, of {places}")
    models = [network for network in found if network.kind != _BESIDE]
    places = [f"a {n.kind} under {n.prefix!r}" if n.prefix else f"a {n.kind}" for n in models]
    held = ", ".join(places or other_kinds(names)[:1]) or "no network that is known here"
    raise ValueError(f"{path} holds no {kind}, but {held}")


def list_networks(path: str | os.PathLike, *, variant: str | None = None) -> list[HeldNetwork]:
    """List the networks of a file, or of the parts of a diffusers folder.

    Raises what open_weights raises.
    """
    listed = []
    for part in diffusers_components(path) or [None]:
        tensors = open_weights(path, part, variant=variant).tensors
        networks = [network for network in find_networks(tensors) if network.kind != _BESIDE]
        prefixes = sorted((network.prefix for network in networks), key=len, reverse=True)
        own: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
        for name in tensors:
            place = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if place is not None and not name.startswith(EMA):
                own[place].append(name)
        for network in networks:
            held = {name: tensors[name] for name in own[network.prefix]}
            shapes = {name: tensor.shape for name, tensor in held.items()}
            is_unet = network.kind == "unet"
            listed.append(
                HeldNetwork(
                    network,
                    part,
                    unet_family(shapes) if is_unet else None,
                    sum(math.prod(shape) for shape in shapes.values()),
                    tuple(sorted({str(tensor.dtype) for tensor in held.values()})),
                )
            )
    return listed


def describe_weights(path: str | os.PathLike) -> list[str]:
    """Say in a line for each network of a file or folder what it is, where, and in which names.

    A file of another kind, such as a LoRA, is called by its name.
    Raises what open_weights raises.
    """
    lines = [network.words for network in list_networks(path)]
    names = [] if diffusers_components(path) else list(open_weights(path).tensors)
    averages = sum(name.startswith(EMA) for name in names)
    lines += [f"{averages} averages (EMA)"] if averages else []
    return lines or other_kinds(names) or ["no network that is known here"]


def other_kinds(names: Collection[str]) -> list[str]:
    """Call files beside a model by their names, by parts of the names of their tensors."""
    return [words for words, part in OTHERS.items() if any(part in name for name in names)]


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
    if any(_TIME.search(name) for name in shapes):
        return _video_family(shapes, context, in_channels)
    vector = any(_VECTOR.search(name) for name in shapes)
    if vector and (context, in_channels) == (REFINER.context, REFINER.in_channels):
        return REFINER
    for family in FAMILIES:
        if (family.context, family.in_channels) == (context, in_channels):
            return family
    text = f"text of width {context}" if context else "no text"
    return Family("other", f"a UNet for {in_channels} channels and {text}", context, in_channels)


def _video_family(shapes: Shapes, context: int | None, in_channels: int | None) -> Family:
    width = next((shape[1] for name, shape in shapes.items() if _WIDTH.search(name)), None)
    views = "one view"
    if any(".time_mix_blocks." in name for name in shapes):
        motion = any(".time_mixer_motion." in name for name in shapes)
        views = "views and motion" if motion else "views"
    found = VIDEO_FAMILIES.get((width, views)) if width is not None else None
    if found is None or (found.context, found.in_channels) != (context, in_channels):
        return VIDEO._replace(context=context, in_channels=in_channels)
    return found
