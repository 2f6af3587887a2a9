"""LoRAs of a denoising network and its text encoders: from files, to files, out of a run."""

import os
from collections.abc import Mapping

import jax

from diffusion_jax.convert.weights.lora import (
    Factors,
    Lora,
    Spot,
    magnitude_of,
    merge_lora,
    read_lora,
)
from diffusion_jax.convert.weights.names import Part
from diffusion_jax.experiment.binding import ConfigError
from diffusion_jax.experiment.export import encoders_of
from diffusion_jax.experiment.network import Network
from diffusion_jax.experiment.task import Trained
from diffusion_jax.models.layers.low_rank import DOWN, MAGNITUDE, UP
from diffusion_jax.train.adapters import Adapter, at, is_stacked, replaced
from diffusion_jax.types import PyTree

# The slots of convert.weights.lora.
NETWORK, TEXTS = "network", ("text", "text_2")


def lora_trees(network: Network, params: PyTree, frozen: PyTree) -> dict[str, PyTree]:
    """Find the parameters that a LoRA may change, by slot, wherever they are kept."""
    places = _places(network, params, frozen)
    return {slot: at((params, frozen)[side], path) for slot, (side, path) in places.items()}


def with_loras(
    network: Network, params: PyTree, frozen: PyTree, loras: Mapping[str | os.PathLike, float]
) -> tuple[PyTree, PyTree]:
    """Add LoRA files to the weights of a model, each times a number -> (params, frozen).

    Raises ValueError when a file does not fit; all are read before anything is changed.
    """
    trees = lora_trees(network, params, frozen)
    read = [(read_lora(path, trees), weight) for path, weight in loras.items()]
    for lora, weight in read:
        trees = merge_lora(trees, lora, weight)
    sides = [params, frozen]
    for slot, (side, path) in _places(network, params, frozen).items():
        sides[side] = replaced(sides[side], path, trees[slot])
    return sides[0], sides[1]


def ranks_of(network: Network, chosen: Mapping[str, Adapter], base: PyTree) -> dict[Spot, int]:
    """Name the rank of each layer of a base that is adapted; ConfigError as in lora_of."""
    spots = _spots(network, chosen, base)
    return {spot: chosen[path].rank for path, own in spots.items() for spot in own}


def lora_of(network: Network, chosen: Mapping[str, Adapter], trained: Trained) -> Lora:
    """Make of the adapters that a run has trained what a file holds.

    Raises ConfigError for an adapted encoder that no file has a place for.
    """
    lora: Lora = {}
    for path, spots in _spots(network, chosen, trained.frozen).items():
        adapter, factors = chosen[path], at(trained.params["adapters"], path)
        held = jax.device_get({**factors, "kernel": at(trained.frozen, path)["kernel"]})
        for spot in spots:
            index = () if spot.part.index is None else spot.part.index
            own = {name: leaf[index] for name, leaf in held.items()}
            relative = own[MAGNITUDE] if MAGNITUDE in own else None
            magnitude = None if relative is None else magnitude_of(own["kernel"], relative)
            alpha = adapter.scale * adapter.rank
            lora[spot] = Factors(own[DOWN], own[UP], alpha, magnitude)
    return lora


def _spots(network: Network, chosen: Mapping[str, Adapter], base: PyTree) -> dict[str, list[Spot]]:
    """Find the spot of each adapted layer of a base, or one for each block of a stacked layer."""
    homes = {path: slot for slot, (_, path) in _places(network, {}, base).items()}
    found = {}
    for path in chosen:
        home = next((own for own in homes if path.startswith(f"{own}/")), None)
        if home is None:
            raise ConfigError(
                f"{path} is adapted, which the layouts of LoRA files have no name for"
            )
        leaf = f"{path.removeprefix(f'{home}/')}/kernel"
        count = at(base, path)["kernel"].shape[0]
        blocks = range(count) if is_stacked(path) else [None]
        found[path] = [Spot(homes[home], Part(leaf, index)) for index in blocks]
    return found


def _places(network: Network, params: PyTree, frozen: PyTree) -> dict[str, tuple[int, str]]:
    """Find where the weights of each slot are: {slot: (0 for params or 1 for frozen, path)}."""
    found = {NETWORK: (int(NETWORK not in params), NETWORK)}
    for encoder in encoders_of(network):
        if encoder.slot in TEXTS:
            trained = "conditioner" in params and encoder.name in params["conditioner"]
            found[encoder.slot] = (int(not trained), f"conditioner/{encoder.name}")
    return found
