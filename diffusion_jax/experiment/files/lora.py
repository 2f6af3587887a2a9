"""LoRAs of a denoising network and its text encoders: from files, to files, out of a run."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.convert.weights.lora import (
    Factors,
    Lora,
    magnitude_of,
    merge_lora,
    read_lora,
)
from diffusion_jax.convert.weights.lora_names import Spot
from diffusion_jax.convert.weights.names import Part
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.export import encoders_of
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.task import Trained
from diffusion_jax.models.layers.low_rank import DOWN, MAGNITUDE, UP
from diffusion_jax.train.adapters import Adapter, at, is_stacked, replaced
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted, few_of

# The slots of convert.weights.lora.
NETWORK, TEXTS = "network", ("text", "text_2")
_SHOWN = 3


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


def read_adapters(
    network: Network,
    chosen: Mapping[str, Adapter],
    path: str | os.PathLike,
    base: PyTree,
    *,
    dora: bool,
) -> Lora:
    """Read a LoRA file that has the layers, the ranks and the kind of the adapters of a run.

    base: the frozen weights, or their shapes. Raises ConfigError, saying what differs, for another
    file, and what read_lora raises.
    """
    lora = read_lora(path, lora_trees(network, {}, base))
    homes = _spots(network, chosen, base)
    here = {spot: chosen[home].rank for home, spots in homes.items() for spot in spots}
    ranks = {spot: factors.down.shape[-1] for spot, factors in lora.items()}
    others = [spot for spot in here if spot in ranks and ranks[spot] != here[spot]]
    problems = {
        ("has", "have", " of the file", "no adapter here"): [
            _name(s) for s in ranks if s not in here
        ],
        ("is", "are", " here", "not in the file"): [_name(s) for s in here if s not in ranks],
        ("has", "have", "", "another rank"): [
            f"{_name(s)} has {ranks[s]} in the file and {here[s]} here" for s in others
        ],
        ("has", "have", " of the file", "magnitudes (DoRA), and config.adapters.dora = False"): [
            _name(s) for s in lora if lora[s].magnitude is not None and not dora
        ],
        ("has", "have", " of the file", "no magnitudes, and config.adapters.dora = True"): [
            _name(s) for s in lora if lora[s].magnitude is None and dora
        ],
    }
    lines = [
        f"{counted(len(n), f'layer{where} {one}', f'layers{where} {many}')} {what}: "
        f"{few_of(n, _SHOWN)}"
        for (one, many, where, what), n in problems.items()
        if n
    ]
    if lines:
        raise ConfigError(
            f"config.adapters.from_file = {str(path)!r} does not fit config.adapters: "
            f"{'; '.join(lines)}"
        )
    return lora


def adapters_of(
    network: Network, chosen: Mapping[str, Adapter], lora: Lora, adapters: PyTree, base: PyTree
) -> PyTree:
    """Make of what read_adapters read the adapters of a run, where `adapters` lie."""
    for path, spots in _spots(network, chosen, base).items():
        like, kernel = at(adapters, path), at(base, path)["kernel"]
        own = [_first(lora[spot], chosen[path], kernel, spot.part.index) for spot in spots]
        stacked = is_stacked(path)
        read = {n: np.stack([o[n] for o in own]) if stacked else own[0][n] for n in like}
        placed = {name: jax.device_put(read[name], like[name].sharding) for name in like}
        adapters = replaced(adapters, path, placed)
    return adapters


def _name(spot: Spot) -> str:
    number = "" if spot.part.index is None else f" [{spot.part.index}]"
    return f"{spot.slot}/{spot.part.path.removesuffix('/kernel')}{number}"


def _first(factors: Factors, adapter: Adapter, kernel: Any, index: int | None) -> dict[str, Any]:
    """Turn what a file holds of a layer into factors that count as much with our scale."""
    gain = np.float32(factors.scale / adapter.scale)
    down, up = (np.asarray(a, np.float32) for a in (factors.down, factors.up))
    found = {DOWN: down, UP: up if gain == 1.0 else gain * up}
    if factors.magnitude is not None:
        own = kernel if index is None else kernel[index]
        found[MAGNITUDE] = np.asarray(factors.magnitude, np.float32) / magnitude_of(own, 1.0)
    return found


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
