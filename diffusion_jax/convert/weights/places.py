"""Whole checkpoints: under which prefix, or in which folder, each network stands."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.types import PyTree


class Slot(NamedTuple):
    """A place for a network: the prefix of its names (or its folder), and its NameMap's name."""

    place: str
    name_map: str


class Places(NamedTuple):
    """The slots of one kind of checkpoint; conditioner: {name of a text or image encoder: slot}."""

    network: Slot
    first_stage: Slot
    conditioner: Mapping[str, Slot]


def _original(conditioner: Mapping[str, Slot]) -> Places:
    """Give the places of the originals, which differ in the conditioner alone."""
    return Places(
        Slot("model.diffusion_model.", "unet_ldm"),
        Slot("first_stage_model.", "vae_ldm"),
        conditioner,
    )


def _frames(number: int) -> Slot:
    """Give the place of an encoder of frames, the embedder with this number."""
    return Slot(f"{_EMBEDDER}{number}.encoder.", "vae_ldm")


_EMBEDDER = "conditioner.embedders."
_IMAGE = {"image": Slot(f"{_EMBEDDER}0.open_clip.model.visual.", "clip_vision_open")}
PLACES: dict[str, Places] = {
    "sd1": _original({"text": Slot("cond_stage_model.transformer.", "clip_text_hf")}),
    "sd2": _original({"text": Slot("cond_stage_model.model.", "clip_text_open")}),
    "sdxl": _original(
        {
            "text": Slot(f"{_EMBEDDER}0.transformer.", "clip_text_hf"),
            "text_2": Slot(f"{_EMBEDDER}1.model.", "clip_text_open"),
        },
    ),
    "sdxl_refiner": _original({"text_2": Slot(f"{_EMBEDDER}0.model.", "clip_text_open")}),
    "svd": _original(_IMAGE | {"frames": _frames(3)}),
    "sv3d": _original(_IMAGE | {"frames": _frames(1)}),
    "sv4d": _original(
        _IMAGE | {"frames": _frames(1), "frames_2": _frames(4), "frames_3": _frames(5)}
    ),
}
DIFFUSERS = Places(
    Slot("unet", "unet_diffusers"),
    Slot("vae", "vae_diffusers"),
    {
        "text": Slot("text_encoder", "clip_text_hf"),
        "text_2": Slot("text_encoder_2", "clip_text_hf"),
        "image": Slot("image_encoder", "clip_vision_hf"),
    },
)


def export_checkpoint(
    path: str | os.PathLike,
    components: Mapping[str, Any],
    places: str,
    *,
    dtype: Any = None,
    ema: PyTree = None,
    extras: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
    nonfinite: bool = False,
) -> None:
    """Write a whole checkpoint as one .safetensors file.

    components: any of {"network": tree, "first_stage": tree, "conditioner": {slot: tree}}, with
    the names of slots that PLACES[places] has. ema: averages of the network, written beside it
    under the names model_ema.*. extras: arrays by their full names, such as alphas_cumprod or
    denoiser.sigmas. metadata: words for the header. nonfinite: see export_params.
    Raises ValueError for unknown places or slots, and what save_weights raises.
    """
    if places not in PLACES:
        raise ValueError(f"places = {places!r} is unknown; choose from {', '.join(PLACES)}")
    chosen = PLACES[places]
    exported = [
        export_params(tree, slot.name_map, slot.place, dtype=dtype, nonfinite=nonfinite)
        for slot, tree in slots_of(chosen, components).values()
    ]
    if ema is not None:
        network = chosen.network
        options: dict[str, Any] = {"dtype": dtype, "nonfinite": nonfinite, "ema": True}
        exported.append(export_params(ema, network.name_map, network.place, **options))
    save_weights(path, exported, extras, metadata)


def slots_of(places: Places, components: Mapping[str, Any]) -> dict[str, tuple[Slot, PyTree]]:
    """Pair the trees of export_checkpoint's components with their slots, by the slots' names."""
    slots = {"network": places.network, "first_stage": places.first_stage, **places.conditioner}
    trees = {name: tree for name, tree in components.items() if name != "conditioner"}
    trees |= components.get("conditioner", {})
    unknown = [name for name in trees if name not in slots]
    if unknown:
        raise ValueError(
            f"component {unknown[0]!r} has no place in this checkpoint; it has {', '.join(slots)}"
        )
    return {name: (slots[name], tree) for name, tree in trees.items()}
