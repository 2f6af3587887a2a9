"""The names that LoRA files have for layers: of PEFT and diffusers, or of kohya's scripts."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, TypeAlias

from diffusion_jax.convert.weights.names import Part, file_tensors
from diffusion_jax.convert.weights.tables import DIT_DIFFUSERS
from diffusion_jax.types import PyTree

LoraLayout: TypeAlias = Literal["peft", "kohya"]
LAYOUTS: tuple[LoraLayout, ...] = ("peft", "kohya")
_KERNEL = "/kernel"
# The end of a tensor's name -> what it is.
_ROLES = {
    "down": r"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down)\.(default\.)?weight$",
    "up": r"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up)\.(default\.)?weight$",
    "alpha": r"\.alpha$",
    "magnitude": r"\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)$",
}
# How the name of a module begins in files -> the slot of its network. "." and "_" are alike here.
# The modules of a transformer may have no prefix, or PEFT's.
_SLOTS = (
    (r"^(lora_)?unet_", "network"),
    (r"^transformer_(?!blocks_)", "network"),
    (r"^(base_model_model_)?(?=((transformer_)?blocks_\d|pos_embed_|proj_out_\d))", "network"),
    (r"^(lora_te2_|text_encoder_2_)(text_model_)?", "text_2"),
    (r"^(lora_te1?_|text_encoder_)(text_model_)?", "text"),
)
_PEFT = {"network": "unet", "text": "text_encoder", "text_2": "text_encoder_2"}
# A layer here that is three layers there: of the queries, the keys and the values.
_FUSED = ".to_qkv"
_THIRDS = (".to_q", ".to_k", ".to_v")


class Spot(NamedTuple):
    """A layer: the slot of its network, and the kernel, or the block of a stacked one."""

    slot: str
    part: Part


class Place(NamedTuple):
    """What a module of a file belongs to: a layer, or the outputs of a layer's equal share."""

    spot: Spot
    share: int = 0
    shares: int = 1


def role_of(name: str) -> tuple[str | None, str]:
    """Split the name of a tensor -> (down, up, alpha, magnitude or None, name of its module)."""
    for role, pattern in _ROLES.items():
        match = re.search(pattern, name)
        if match:
            return role, name[: match.start()]
    return None, name


def plain_name(module: str) -> tuple[str, str]:
    """Name a module without its separators -> (slot, name); the slot is "" for an unknown one."""
    plain = module.replace(".", "_")
    for pattern, slot in _SLOTS:
        rest, count = re.subn(pattern, "", plain, count=1)
        if count:
            return slot, rest
    return "", plain


def places_of(trees: Mapping[str, PyTree]) -> dict[tuple[str, str], Place]:
    """Find the place of every plain name that a file may have for a layer."""
    found = {}
    for slot, tree in trees.items():
        maps = ("clip_text_hf",)
        if slot == "network":
            maps = ("dit", "dit_diffusers") if is_dit(tree) else ("unet_ldm", "unet_diffusers")
        for name_map in maps:
            for name, spot in _modules(slot, tree, name_map):
                own = split_names(name)
                for share, module in enumerate(own):
                    plain = module.removeprefix("text_model.").replace(".", "_")
                    found[slot, plain] = Place(spot, share, len(own))
    return found


def names_of(trees: Mapping[str, PyTree], layout: LoraLayout) -> dict[Spot, tuple[str, ...]]:
    """Name the module, or the modules, of each layer in a layout."""
    is_xl = "text_2" in trees
    names = {}
    for slot, tree in trees.items():
        name_map = "clip_text_hf"
        if slot == "network" and is_dit(tree):
            name_map = "dit_diffusers"
            if layout == "kohya":
                continue
        elif slot == "network":
            name_map = "unet_ldm" if layout == "kohya" and is_xl else "unet_diffusers"
        for name, spot in _modules(slot, tree, name_map):
            if layout == "peft":
                names[spot] = split_names(f"{prefix_of(slot, tree)}.{name}")
            else:
                texts = {"text": "te1" if is_xl else "te", "text_2": "te2"}
                prefix = "unet" if slot == "network" else texts[slot]
                names[spot] = (f"lora_{prefix}_{name.replace('.', '_')}",)
    return names


def prefix_of(slot: str, tree: PyTree) -> str:
    """Name the network as the files of PEFT and diffusers do."""
    return "transformer" if slot == "network" and is_dit(tree) else _PEFT[slot]


def split_names(module: str) -> tuple[str, ...]:
    """Name the modules that a file may have for one module here."""
    if not module.endswith(_FUSED):
        return (module,)
    return tuple(module.removesuffix(_FUSED) + third for third in _THIRDS)


def is_dit(tree: Iterable[str]) -> bool:
    """Tell a transformer over patches from a UNet by its first layer."""
    return "x_embedder_proj" in tree


def _modules(slot: str, tree: PyTree, name_map: str) -> Iterator[tuple[str, Spot]]:
    """Name the layers of a tree; none where the names have no place for such a network."""
    renames = DIT_DIFFUSERS if name_map == "dit_diffusers" else ()
    try:
        tensors = file_tensors(tree, "dit" if renames else name_map)
    except ValueError:
        if name_map != "unet_diffusers":
            raise
        return
    for tensor in tensors:
        if not (tensor.parts[0].path.endswith(_KERNEL) and len(tensor.parts) == 1):
            continue
        name = tensor.name
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if renames and name == tensor.name:
            continue  # diffusers keeps the embedding of a timestep once for each block
        yield name.removesuffix(".weight"), Spot(slot, tensor.parts[0])
