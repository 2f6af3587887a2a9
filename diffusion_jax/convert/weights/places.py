"""Whole checkpoints: which network stands under which prefix, or in which folder."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.convert.weights.identify import checkpoint_layout
from diffusion_jax.convert.weights.importing import import_params
from diffusion_jax.convert.weights.reading import Weights, diffusers_components, open_weights
from diffusion_jax.types import PyTree


class Slot(NamedTuple):
    """A place for a network: the prefix of its names (or its folder), and its NameMap's name."""

    place: str
    name_map: str


class Layout(NamedTuple):
    """A kind of checkpoint; conditioner: slots by the name that `components` gives them."""

    network: Slot
    first_stage: Slot
    conditioner: Mapping[str, Slot]


_NETWORK = Slot("model.diffusion_model.", "unet_ldm")
_FIRST_STAGE = Slot("first_stage_model.", "vae_ldm")
_EMBEDDER = "conditioner.embedders."
LAYOUTS: dict[str, Layout] = {
    "sd1": Layout(
        _NETWORK,
        _FIRST_STAGE,
        {"text": Slot("cond_stage_model.transformer.", "clip_text_hf")},
    ),
    "sd2": Layout(
        _NETWORK, _FIRST_STAGE, {"text": Slot("cond_stage_model.model.", "clip_text_open")}
    ),
    "sdxl": Layout(
        _NETWORK,
        _FIRST_STAGE,
        {
            "text": Slot(f"{_EMBEDDER}0.transformer.", "clip_text_hf"),
            "text_2": Slot(f"{_EMBEDDER}1.model.", "clip_text_open"),
        },
    ),
    "sdxl_refiner": Layout(
        _NETWORK, _FIRST_STAGE, {"text_2": Slot(f"{_EMBEDDER}0.model.", "clip_text_open")}
    ),
    "svd": Layout(
        _NETWORK,
        _FIRST_STAGE,
        {
            "image": Slot(f"{_EMBEDDER}0.open_clip.model.visual.", "clip_vision_open"),
            "frames": Slot(f"{_EMBEDDER}3.encoder.", "vae_ldm"),
        },
    ),
}
DIFFUSERS = Layout(
    Slot("unet", "unet_diffusers"),
    Slot("vae", "vae_diffusers"),
    {
        "text": Slot("text_encoder", "clip_text_hf"),
        "text_2": Slot("text_encoder_2", "clip_text_hf"),
        "image": Slot("image_encoder", "clip_vision_hf"),
    },
)
WEIGHTS_OF_FOLDER = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "image_encoder": "model.safetensors",
}


def export_checkpoint(
    path: str | os.PathLike,
    components: Mapping[str, Any],
    layout: str,
    *,
    dtype: Any = None,
    ema: PyTree = None,
    extras: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a whole checkpoint as one .safetensors file.

    components: any of {"network": tree, "first_stage": tree, "conditioner": {slot: tree}}; layout:
    a name in LAYOUTS, which names the slots. ema: averages of the network, written as model_ema.*
    twins. extras: arrays by their full names, such as alphas_cumprod or denoiser.sigmas.
    Raises ValueError for an unknown layout or slot, and what save_weights raises.
    """
    chosen = _layout(layout)
    exported = [
        export_params(tree, slot.name_map, slot.place, dtype=dtype)
        for slot, tree in slots_of(chosen, components).values()
    ]
    if ema is not None:
        network = chosen.network
        exported.append(export_params(ema, network.name_map, network.place, dtype=dtype, ema=True))
    save_weights(path, exported, extras)


def import_checkpoint(
    components: Mapping[str, Any],
    path: str | os.PathLike,
    layout: str | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Read a whole checkpoint, a file or a folder of diffusers -> {"network": ..., ...}.

    components: what is wanted, as in export_checkpoint, of arrays or shapes (see import_params).
    layout: None to tell by the names in the file. options: {"network": import_params' keywords,
    ...}, by "network", "first_stage" or the slot's name.
    """
    folder = Path(path).is_dir() and bool(diffusers_components(path))
    weights = None if folder else open_weights(path)
    if weights is None:
        chosen = DIFFUSERS
    else:
        chosen = _layout(_told(weights) if layout is None else layout)

    def read(slot: Slot, tree: PyTree, name: str) -> PyTree:
        kwargs = (options or {}).get(name, {})
        if weights is None:
            return import_params(tree, open_weights(path, slot.place), slot.name_map, **kwargs)
        return import_params(tree, weights, slot.name_map, prefix=slot.place, **kwargs)

    return _map_slots(chosen, components, read)


def _told(weights: Weights) -> str:
    try:
        return checkpoint_layout(weights.tensors)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from error


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"layout {name!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def slots_of(layout: Layout, components: Mapping[str, Any]) -> dict[str, tuple[Slot, PyTree]]:
    """Pair the slots of a layout with the trees that are there, by the slots' names."""
    slots = {"network": layout.network, "first_stage": layout.first_stage, **layout.conditioner}
    trees = {k: v for k, v in components.items() if k != "conditioner"}
    trees |= components["conditioner"] if "conditioner" in components else {}
    unknown = [name for name in trees if name not in slots]
    if unknown:
        raise ValueError(
            f"component {unknown[0]!r} has no place in this layout; it has {', '.join(slots)}"
        )
    return {name: (slots[name], tree) for name, tree in trees.items()}


def _map_slots(
    layout: Layout, components: Mapping[str, Any], read: Callable[[Slot, PyTree, str], PyTree]
) -> dict[str, Any]:
    done = {
        name: read(slot, tree, name) for name, (slot, tree) in slots_of(layout, components).items()
    }
    result = {name: done[name] for name in ("network", "first_stage") if name in done}
    if "conditioner" in components:
        result["conditioner"] = {name: done[name] for name in components["conditioner"]}
    return result
