"""Which tensors of a file hold which of our parameters: one description, read in both directions.

A NameMap is data (tables.py); file_tensors applies it to the leaves of a network.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.convert.weights import first_stage_names, tables
from diffusion_jax.convert.weights.tables import Renames
from diffusion_jax.types import PyTree

# A leaf whose path has this module without a number holds a scan's blocks along its first axis.
STACKS = re.compile(r"(^|/)(transformer_blocks|layers)(?=/)")
# Leaves that stand in one tensor, in this order (OpenCLIP's in_proj_weight).
_FUSED = re.compile(r"/self_attn/([qkv])_proj/")


class Part(NamedTuple):
    """A leaf, or with an index one block of a stacked leaf."""

    path: str
    index: int | None


class FileTensor(NamedTuple):
    """A tensor of a file: its parts are joined along its first axis.

    layout: "same" (our axes), "kernel" ([*sides in out] here is [out in *sides] there),
    "pointwise" (our 1 x 1 convolution is a dense layer there) or "channel" ([c] is [1 c 1 1]
    there). aliases: other names it may have.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    parts: tuple[Part, ...]
    aliases: tuple[str, ...] = ()


class NameMap(NamedTuple):
    """The names of one kind of network in one layout of files; all but the kind is tables.py's.

    structural: makes renames that depend on which names there are; they come between dotted and
    renames. layouts: (pattern of the name, layout) where it is not that of the leaf. aliases: other
    names to look for. ignorable: names in files that are no parameters. first: the convolution that
    sees the input.
    """

    kind: str
    dotted: Renames
    renames: Renames = ()
    structural: Callable[[Iterable[str]], Renames] | None = None
    layouts: tuple[tuple[str, str], ...] = ()
    aliases: Renames = ()
    ignorable: tuple[str, ...] = ()
    first: str = ""


def unet_blocks(names: Iterable[str]) -> Renames:
    """Renames of input_blocks.N and output_blocks.N to diffusers' levels and blocks.

    A level of the way down ends with a convolution `op`, one of the way up with `conv`.
    Raises ValueError for a network that diffusers' UNet2DConditionModel has no place for.
    """
    names = list(names)
    if any(".qkv." in name for name in names):
        raise ValueError(
            "attention blocks without text (qkv) have no place in diffusers' UNet2DConditionModel; "
            "use the layout of latent-diffusion"
        )
    blocks = sorted({tuple(name.split(".")[:3]) for name in names if "put_blocks." in name})
    numbers = {side: {int(n) for s, n, _ in blocks if s == side} for side, _, _ in blocks}
    if "input_blocks" not in numbers:
        raise ValueError(f"this is no UNet: its parameters are {', '.join(names[:3])} ...")
    if numbers["input_blocks"] != set(range(len(numbers["output_blocks"]))):
        raise ValueError("a UNet that halves its sides without convolutions has no diffusers name")
    renames = []
    for side, theirs in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks")):
        level = block = 0
        for n in sorted(numbers[side] - ({0} if side == "input_blocks" else set())):
            ours, ended = f"{side}.{n}", False
            for child in sorted(child for s, m, child in blocks if s == side and int(m) == n):
                here = rf"^{re.escape(f'{ours}.{child}')}\."
                if any(name.startswith(f"{ours}.{child}.op.") for name in names):
                    renames.append((f"{here}op\\.", f"{theirs}.{level}.downsamplers.0.conv."))
                    ended = True
                elif any(name.startswith(f"{ours}.{child}.conv.") for name in names):
                    renames.append((here, f"{theirs}.{level}.upsamplers.0."))
                    ended = True
                else:
                    kind = "resnets" if child == "0" else "attentions"
                    renames.append((here, f"{theirs}.{level}.{kind}.{block}."))
            level, block = (level + 1, 0) if ended else (level, block + 1)
    return tuple(renames)


def vae_levels(names: Iterable[str]) -> Renames:
    """Renames of the decoder's levels: diffusers counts from the lowest resolution."""
    found = [re.search(r"\bup\.(\d+)\.", name) for name in names]
    count = 1 + max((int(match[1]) for match in found if match), default=-1)
    renames = []
    for level in range(count):
        theirs = f".up_blocks.{count - 1 - level}"
        renames += [
            (rf"\.up\.{level}\.block\.", f"{theirs}.resnets."),
            (rf"\.up\.{level}\.attn\.", f"{theirs}.attentions."),
            (rf"\.up\.{level}\.upsample\.", f"{theirs}.upsamplers.0."),
        ]
    return tuple(renames)


_DENSE_ATTENTION = ((r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", "pointwise"),)
NAME_MAPS: dict[str, NameMap] = {
    "unet_ldm": NameMap("unet", tables.DOTTED, first="input_blocks.0.0.weight"),
    "unet_diffusers": NameMap(
        "unet",
        tables.DOTTED,
        tables.UNET_DIFFUSERS,
        unet_blocks,
        aliases=tables.UNET_ALIASES,
        first="conv_in.weight",
    ),
    # unCLIP: the vector enters as class_embedding.
    "unet_diffusers_class": NameMap(
        "unet",
        tables.DOTTED,
        tables.UNET_DIFFUSERS + tables.UNET_ALIASES,
        unet_blocks,
        first="conv_in.weight",
    ),
    # Everything else of a training checkpoint belongs to the loss.
    "vae_ldm": NameMap(
        "vae",
        tables.VAE_DOTTED,
        structural=first_stage_names.codebook_names,
        aliases=tables.CODES_ALIASES,
        ignorable=(r"loss\.", "model_ema\\."),
        first="encoder.conv_in.weight",
    ),
    "vae_diffusers": NameMap(
        "vae",
        tables.VAE_DOTTED,
        tables.VAE_DIFFUSERS,
        vae_levels,
        layouts=_DENSE_ATTENTION,
        aliases=tables.VAE_ALIASES,
        first="encoder.conv_in.weight",
    ),
    "clip_text_hf": NameMap(
        "clip text",
        tables.DOTTED,
        tables.TEXT_HF,
        aliases=tables.TEXT_ALIASES,
        ignorable=(r"(text_model\.)?embeddings\.position_ids$",),
    ),
    "clip_text_open": NameMap(
        "clip text",
        tables.DOTTED,
        tables.TEXT_OPEN,
        layouts=((r"^text_projection$", "same"),),
        ignorable=(r"logit_scale$", r"attn_mask$", r"visual\.", r"text_projection$"),
    ),
    "clip_vision_hf": NameMap(
        "clip vision",
        tables.DOTTED,
        tables.VISION_HF,
        aliases=tables.VISION_ALIASES,
        ignorable=(r"(vision_model\.)?embeddings\.position_ids$",),
    ),
    "clip_vision_open": NameMap(
        "clip vision", tables.DOTTED, tables.VISION_OPEN, layouts=((r"^proj$", "same"),)
    ),
    "first_stage_ldm": NameMap(
        "first stage",
        tables.VAE_DOTTED,
        structural=first_stage_names.training_names,
        layouts=((r"\.main\.\d+\.(loc|scale)$", "channel"),),
        aliases=tables.CODES_ALIASES,
        ignorable=(*first_stage_names.BUFFERS, r"loss\.perceptual_loss\.", r"model_ema\."),
        first="encoder.conv_in.weight",
    ),
    "lpips": NameMap(
        "LPIPS",
        tables.DOTTED,
        structural=first_stage_names.lpips_names,
        ignorable=first_stage_names.BUFFERS,
    ),
    # Networks whose names differ by dots alone.
    "dotted": NameMap("module", tables.DOTTED),
}


def leaves_of(tree: PyTree) -> dict[str, Any]:
    """List a tree's leaves by path, such as "out_0/scale"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in flat}


def file_tensors(tree: PyTree, name_map: NameMap | str) -> list[FileTensor]:
    """Describe the file tensors that hold the parameters of a tree.

    tree: nested dicts of anything with a shape. name_map: a NameMap or a name in NAME_MAPS.
    Raises ValueError for an unknown name, or a tree that the map does not fit.
    """
    if isinstance(name_map, str):
        if name_map not in NAME_MAPS:
            raise ValueError(f"name map {name_map!r} is unknown; choose one of {list(NAME_MAPS)}")
        name_map = NAME_MAPS[name_map]
    parts = [part for path, leaf in leaves_of(tree).items() for part in _parts(path, leaf.shape)]
    named = {part: _rename(_dotted_path(path), name_map.dotted) for part, path, _ in parts}
    renames = name_map.structural(named.values()) if name_map.structural else ()
    joined: dict[str, list[tuple[str, Part, tuple[int, ...], str]]] = {}
    for part, path, shape in parts:
        name = _rename(named[part], renames + name_map.renames)
        layout = next((kind for pattern, kind in name_map.layouts if re.search(pattern, name)), "")
        layout = layout or ("kernel" if path.endswith("/kernel") else "same")
        match = _FUSED.search(path)
        place = str("qkv".index(match[1])) if match else ""
        joined.setdefault(name, []).append((place, part, _file_shape(shape, layout), layout))
    return [
        _join(name, sorted(held, key=lambda h: h[0]), name_map.aliases)
        for name, held in joined.items()
    ]


def _parts(path: str, shape: tuple[int, ...]) -> list[tuple[Part, str, tuple[int, ...]]]:
    """Split a stacked leaf into its blocks: (part, path of the block, its shape)."""
    if not STACKS.search(path):
        return [(Part(path, None), path, tuple(shape))]
    return [
        (Part(path, i), STACKS.sub(rf"\1\2_{i}", path), tuple(shape[1:])) for i in range(shape[0])
    ]


def _dotted_path(path: str) -> str:
    *modules, leaf = path.split("/")
    return ".".join([*modules, tables.LEAVES[leaf] if leaf in tables.LEAVES else leaf])


def _rename(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _file_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    if layout == "kernel":
        return (shape[-1], shape[-2], *shape[:-2])
    if layout == "channel":
        return (1, *shape, 1, 1)
    return (shape[-1], shape[-2]) if layout == "pointwise" else shape


def _join(name: str, held: list[tuple[str, Part, tuple[int, ...], str]], aliases: Renames) -> Any:
    places, parts, shapes, layouts = zip(*held, strict=True)
    if len(parts) > 1 and "".join(places) != "012":
        raise ValueError(f"{', '.join(part.path for part in parts)} would all be called {name}")
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(parts) > 1 else shapes[0]
    other = _rename(name, aliases)
    return FileTensor(name, shape, layouts[0], parts, () if other == name else (other,))


def to_file(array: np.ndarray, layout: str) -> np.ndarray:
    """Move the axes of our array to where a file has them: a view."""
    if layout == "kernel":
        return np.moveaxis(array, (-1, -2), (0, 1))
    if layout == "channel":
        return array[None, :, None, None]
    return array[0, 0].T if layout == "pointwise" else array


def to_ours(array: np.ndarray, layout: str) -> np.ndarray:
    """Move the axes of a file's array to where ours are: a view, the inverse of to_file."""
    if layout == "kernel":
        return np.moveaxis(array, (0, 1), (-1, -2))
    if layout == "channel":
        return array[0, :, 0, 0]
    return array.T[None, None] if layout == "pointwise" else array
