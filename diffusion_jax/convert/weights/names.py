"""Which tensors of a file hold which of our parameters, for reading and for writing.

A NameMap is made of the tables in tables.py; file_tensors applies it to the leaves of a network.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.convert.weights import first_stage_names, tables
from diffusion_jax.convert.weights.tables import Renames
from diffusion_jax.types import PyTree

# Without a number after it, such a module is scanned: its leaves hold blocks on their first axis.
# Residual blocks over time have two of these names, too.
STACKS = re.compile(
    r"(^|/)(transformer_blocks(?=/)|layers(?=/)|blocks(?=/)"
    r"|(?:time_stack|time_mix_blocks|motion_blocks)(?=/(?:norm|attn|ff)))"
)
# OpenCLIP joins these three leaves, in this order, in one tensor (in_proj_weight).
_FUSED = re.compile(r"/self_attn/([qkv])_proj/")


class Part(NamedTuple):
    """A whole leaf (index None), or one block of a leaf that holds stacked blocks."""

    path: str
    index: int | None


class FileTensor(NamedTuple):
    """A tensor of a file: its parts are joined along its first axis.

    axes: "same" as here, "kernel" ([*sides in out] here is [out in *sides] there), "pointwise"
    (our 1 x 1 convolution is a dense layer there) or "channel" ([c] is [1 c 1 1] there).
    aliases: other names that it may have. turned: a name under which its two axes are swapped.
    """

    name: str
    shape: tuple[int, ...]
    axes: str
    parts: tuple[Part, ...]
    aliases: tuple[str, ...] = ()
    turned: str | None = None


class NameMap(NamedTuple):
    """The names that one family of programs gives to the tensors of one kind of network.

    dotted, structural, renames: renames that are applied in this order; structural makes its own
    from the dotted names of the whole network. axes: (pattern of a name, FileTensor.axes) where
    the leaf's name does not say. aliases: renames to other names to look for; turned: the same,
    where the two axes are swapped under the other name. ignorable: patterns of names in files that
    are no parameters. first: the name of the convolution of the input.
    """

    kind: str
    dotted: Renames
    renames: Renames = ()
    structural: Callable[[Iterable[str]], Renames] | None = None
    axes: tuple[tuple[str, str], ...] = ()
    aliases: Renames = ()
    turned: Renames = ()
    ignorable: tuple[str, ...] = ()
    first: str = ""


def unet_blocks(names: Iterable[str]) -> Renames:
    """Rename input_blocks.N and output_blocks.N to diffusers' levels and blocks.

    A level of the way down ends with a convolution `op`, one of the way up with `conv`. Networks of
    videos get the names of their blocks over time, too.
    Raises ValueError for a network that diffusers' UNet2DConditionModel, or for videos
    UNetSpatioTemporalConditionModel, has no place for.
    """
    names = list(names)
    views = [name for name in names if ".time_mix_blocks." in name]
    if views:
        raise ValueError(
            f"networks of several views ({views[0]}) have no place in diffusers; use the names of "
            "generative-models"
        )
    if any(".qkv." in name for name in names):
        raise ValueError(
            "attention blocks without text (qkv) have no place in diffusers' UNet2DConditionModel; "
            "use the names of latent-diffusion"
        )
    blocks = sorted({tuple(name.split(".")[:3]) for name in names if "put_blocks." in name})
    numbers = {side: {int(n) for s, n, _ in blocks if s == side} for side, _, _ in blocks}
    if "input_blocks" not in numbers:
        raise ValueError(f"this is no UNet: its parameters are {', '.join(names[:3])} ...")
    counted = set(range(len(numbers.get("output_blocks", numbers["input_blocks"]))))
    if numbers["input_blocks"] != counted:
        raise ValueError("a UNet that halves its sides without convolutions has no diffusers name")
    renames = list(tables.UNET_VIDEO) if any(".time_stack." in name for name in names) else []
    for side, theirs in (("input_blocks", "down_blocks"), ("output_blocks", "up_blocks")):
        level = block = 0
        for n in sorted(numbers.get(side, set()) - ({0} if side == "input_blocks" else set())):
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


def control_blocks(names: Iterable[str]) -> Renames:
    """Rename the blocks of a ControlNet, and the convolutions over its hint, for diffusers."""
    names = list(names)
    hints = [re.match(r"input_hint_block\.(\d+)\.", name) for name in names]
    last = max(int(match[1]) for match in hints if match)
    embedding = "controlnet_cond_embedding"
    between = [
        (rf"^input_hint_block\.{n}\.", f"{embedding}.blocks.{n // 2 - 1}.")
        for n in range(2, last, 2)
    ]
    ended = (rf"^input_hint_block\.{last}\.", f"{embedding}.conv_out.")
    return (*unet_blocks(names), *between, ended)


def vae_levels(names: Iterable[str]) -> Renames:
    """Rename the decoder's levels, which diffusers counts from the lowest resolution.

    The decoder of a video gets the names of its blocks over time, too. Raises ValueError where it
    attends over time, for which diffusers' AutoencoderKLTemporalDecoder has no place.
    """
    names = list(names)
    over_time = [name for name in names if ".time_mix_block." in name]
    if over_time:
        raise ValueError(
            f"attention over time ({over_time[0]}) has no place in diffusers' "
            "AutoencoderKLTemporalDecoder; use the names of generative-models"
        )
    found = [re.search(r"\bup\.(\d+)\.", name) for name in names]
    count = 1 + max((int(match[1]) for match in found if match), default=-1)
    renames = list(tables.VAE_VIDEO) if any(".time_stack." in name for name in names) else []
    for level in range(count):
        theirs = f".up_blocks.{count - 1 - level}"
        renames += [
            (rf"\.up\.{level}\.block\.", f"{theirs}.resnets."),
            (rf"\.up\.{level}\.attn\.", f"{theirs}.attentions."),
            (rf"\.up\.{level}\.upsample\.", f"{theirs}.upsamplers.0."),
        ]
    return tuple(renames)


def _transformers(kind: str, projection: str) -> NameMap:
    """Name a CLIP tower as transformers does, with a prefix for all but the projection."""
    return NameMap(
        f"clip {kind}",
        tables.DOTTED,
        ((rf"^(?!{projection}\.)", f"{kind}_model."),),
        # transformers 5 writes no prefix for a model without a projection.
        aliases=((rf"^{kind}_model\.", ""),),
        ignorable=(
            rf"({kind}_model\.)?embeddings\.position_ids$",
            # The rest of a whole CLIP, and projections that a tower without one does not need.
            r"logit_scale$",
            r"(text|visual)_projection\.weight$",
            rf"(?!{kind}_)(text|vision)_model\.",
        ),
    )


# With merge_strategy = "fixed" a file has the factor, which is an option here and no parameter.
_FIXED = (r".*\.time_mixer\.mix_factor$",)
_UNET_DIFFUSERS = NameMap(
    "unet",
    tables.DOTTED,
    tables.UNET_DIFFUSERS,
    unet_blocks,
    aliases=tables.UNET_ALIASES,
    ignorable=_FIXED,
    first="conv_in.weight",
)
NAME_MAPS: dict[str, NameMap] = {
    "unet_ldm": NameMap("unet", tables.DOTTED, ignorable=_FIXED, first="input_blocks.0.0.weight"),
    "unet_diffusers": _UNET_DIFFUSERS,
    # For unCLIP, whose vector enters as class_embedding.
    "unet_diffusers_class": _UNET_DIFFUSERS._replace(
        renames=tables.UNET_DIFFUSERS + tables.UNET_ALIASES, aliases=()
    ),
    "control_ldm": NameMap("controlnet", tables.DOTTED),
    "control_diffusers": _UNET_DIFFUSERS._replace(
        kind="controlnet",
        renames=tables.UNET_DIFFUSERS + tables.CONTROL_DIFFUSERS,
        structural=control_blocks,
    ),
    # Training checkpoints hold the loss beside the network.
    "vae_ldm": NameMap(
        "vae",
        tables.VAE_DOTTED,
        structural=first_stage_names.codebook_names,
        aliases=tables.CODES_ALIASES,
        ignorable=(r"loss\.", r"model_ema\."),
        first="encoder.conv_in.weight",
    ),
    "vae_diffusers": NameMap(
        "vae",
        tables.VAE_DOTTED,
        tables.VAE_DIFFUSERS,
        vae_levels,
        axes=((r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", "pointwise"),),
        aliases=tables.VAE_ALIASES,
        first="encoder.conv_in.weight",
    ),
    "clip_text_hf": _transformers("text", "text_projection"),
    "clip_text_open": NameMap(
        "clip text",
        tables.DOTTED,
        tables.TEXT_OPEN,
        axes=((r"^text_projection$", "same"),),
        turned=((r"^text_projection$", "text_projection.weight"),),
        ignorable=(r"logit_scale$", r"attn_mask$", r"visual\.", r"text_projection(\.weight)?$"),
    ),
    "clip_vision_hf": _transformers("vision", "visual_projection"),
    "clip_vision_open": NameMap(
        "clip vision", tables.DOTTED, tables.VISION_OPEN, axes=((r"^proj$", "same"),)
    ),
    "first_stage_ldm": NameMap(
        "first stage",
        tables.VAE_DOTTED,
        structural=first_stage_names.training_names,
        axes=((r"\.main\.\d+\.(loc|scale)$", "channel"),),
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
    # The positions are computed.
    "dit": NameMap("dit", tables.DIT_DOTTED, ignorable=(r"pos_embed$",)),
    # Networks whose names differ by dots alone.
    "dotted": NameMap("module", tables.DOTTED),
}


class NetworkKind(NamedTuple):
    """The folder of a network in a diffusers pipeline, and its NameMap in a file of its own."""

    folder: str
    name_map: str


KINDS = {
    "unet": NetworkKind("unet", "unet_ldm"),
    "dit": NetworkKind("transformer", "dit"),
    "controlnet": NetworkKind("controlnet", "control_ldm"),
    "vae": NetworkKind("vae", "vae_ldm"),
    "clip text": NetworkKind("text_encoder", "clip_text_hf"),
    "clip vision": NetworkKind("image_encoder", "clip_vision_hf"),
}


def find_kind(kind: str) -> NetworkKind:
    """Look up a kind of network; ValueError for an unknown one."""
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r} is unknown; choose from {', '.join(KINDS)}")
    return KINDS[kind]


def leaves_of(tree: PyTree) -> dict[str, Any]:
    """List a tree's leaves by path, such as "out_0/scale"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in flat}


def find_name_map(name_map: NameMap | str) -> NameMap:
    """Look up a name in NAME_MAPS; a NameMap stands for itself. ValueError for an unknown name."""
    if not isinstance(name_map, str):
        return name_map
    if name_map not in NAME_MAPS:
        raise ValueError(f"name_map = {name_map!r} is unknown; choose from {', '.join(NAME_MAPS)}")
    return NAME_MAPS[name_map]


def average_name(prefix: str, name: str) -> str:
    """Name the average (EMA) of a tensor, which loses the first module of its prefix and all dots.

    The average of "model.diffusion_model." + "out.0.bias" is "model_ema.diffusion_modelout0bias".
    """
    return tables.EMA + (prefix.partition(".")[2] + name).replace(".", "")


def file_tensors(tree: PyTree, name_map: NameMap | str) -> list[FileTensor]:
    """Describe the file tensors that hold the parameters of a tree.

    tree: nested dicts of anything with a shape. name_map: a NameMap or a name in NAME_MAPS.
    Raises ValueError for an unknown name, or a tree that the map does not fit.
    """
    name_map = find_name_map(name_map)
    parts = [part for path, leaf in leaves_of(tree).items() for part in _parts(path, leaf.shape)]
    named = {part: _rename(_dotted_path(path), name_map.dotted) for part, path, _ in parts}
    renames = name_map.structural(named.values()) if name_map.structural else ()
    joined: dict[str, list[tuple[str, Part, tuple[int, ...], str]]] = {}
    for part, path, shape in parts:
        name = _rename(named[part], renames + name_map.renames)
        axes = next((axes for pattern, axes in name_map.axes if re.search(pattern, name)), "")
        axes = axes or ("kernel" if path.endswith("/kernel") else "same")
        match = _FUSED.search(path)
        place = str("qkv".index(match[1])) if match else ""
        joined.setdefault(name, []).append((place, part, _file_shape(shape, axes), axes))
    return [
        _join(name, sorted(held, key=lambda h: h[0]), name_map) for name, held in joined.items()
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


def _file_shape(shape: tuple[int, ...], axes: str) -> tuple[int, ...]:
    if axes == "kernel":
        return (shape[-1], shape[-2], *shape[:-2])
    if axes == "channel":
        return (1, *shape, 1, 1)
    return (shape[-1], shape[-2]) if axes == "pointwise" else shape


def _join(
    name: str, held: list[tuple[str, Part, tuple[int, ...], str]], name_map: NameMap
) -> FileTensor:
    places, parts, shapes, axes = zip(*held, strict=True)
    if len(parts) > 1 and "".join(places) != "012":
        raise ValueError(f"{', '.join(part.path for part in parts)} would all be called {name}")
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(parts) > 1 else shapes[0]
    alias, turned = _rename(name, name_map.aliases), _rename(name, name_map.turned)
    aliases = () if alias == name else (alias,)
    return FileTensor(name, shape, axes[0], parts, aliases, None if turned == name else turned)


def to_file(array: np.ndarray, axes: str) -> np.ndarray:
    """Move the axes of our array to where a file has them: a view."""
    if axes == "kernel":
        return np.moveaxis(array, (-1, -2), (0, 1))
    if axes == "channel":
        return array[None, :, None, None]
    return array[0, 0].T if axes == "pointwise" else array


def to_ours(array: np.ndarray, axes: str) -> np.ndarray:
    """Move the axes of a file's array to where ours are: a view, the inverse of to_file."""
    if axes == "kernel":
        return np.moveaxis(array, (0, 1), (-1, -2))
    if axes == "channel":
        return array[0, :, 0, 0]
    return array.T[None, None] if axes == "pointwise" else array
