"""Read and write LoRA files, in the names of PEFT and diffusers or of kohya's scripts.

A LoRA is kept as {Spot: Factors}: the layers of the networks that it changes, and how. The trees of
parameters that it belongs to are given by slot: "network", "text" and "text_2", as in places.py.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.lora_names import (
    LoraLayout,
    Place,
    Spot,
    names_of,
    places_of,
    plain_name,
    prefix_of,
    role_of,
)
from diffusion_jax.convert.weights.names import leaves_of, to_file, to_ours
from diffusion_jax.convert.weights.reading import Weights, open_weights
from diffusion_jax.convert.weights.safetensors import count_nonfinite
from diffusion_jax.models.layers.low_rank import column_norms, merged_kernel
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted, few_of

_SHOWN = 5
# diffusers and PEFT keep here what their config of a LoRA says.
_ADAPTER_METADATA = "lora_adapter_metadata"


class Factors(NamedTuple):
    """What a LoRA does to a kernel [*k i o]: it adds alpha / rank times down [*k i r] up [r o].

    magnitude [o]: the norm that each column of the sum gets (DoRA), or None.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None

    @property
    def scale(self) -> float:
        """What multiplies the product of the factors."""
        return self.alpha / self.down.shape[-1]


Lora: TypeAlias = dict[Spot, Factors]


def read_lora(path: str | os.PathLike, trees: Mapping[str, PyTree]) -> Lora:
    """Read a file, in whichever names it has, for the networks of trees, {slot: parameters}.

    Raises ValueError, saying how many and which, for layers that the networks do not have, for
    factors of another shape, and for factors that are not there.
    """
    weights = open_weights(Path(os.path.expanduser(path)))
    held, unknown = _sort(weights, places_of(trees))
    kernels = {slot: leaves_of(tree) for slot, tree in trees.items()}
    prefixes = {slot: prefix_of(slot, tree) for slot, tree in trees.items()}
    missing, shapes, nonfinite = [], [], []
    found: dict[Spot, dict[int, Factors]] = {}
    for place, (module, names) in held.items():
        absent = [role for role in ("down", "up") if role not in names]
        if absent:
            missing.append(f"{absent[0]} of {module}")
            continue
        arrays = {role: weights.tensors[name].load() for role, name in names.items()}
        nonfinite += [names[role] for role, array in arrays.items() if count_nonfinite(array)]
        *inputs, outputs = _kernel_shape(kernels, place.spot)
        scale = _said_scale(weights, prefixes[place.spot.slot], module)
        own = _factors(arrays, (*inputs, outputs // place.shares), scale)
        if isinstance(own, str):
            shapes.append(f"{module} {own}")
        else:
            found.setdefault(place.spot, {})[place.share] = own
    lora, counts = {}, {place.spot: place.shares for place in held}
    for spot, shares in found.items():
        joined = _joined(shares, counts[spot])
        if joined is None:
            missing.append(f"a magnitude of {spot.part.path}")
        else:
            lora[spot] = joined
    problems = (
        (unknown, "is of no layer here", "are of no layer here"),
        (missing, "is missing", "are missing"),
        (shapes, "is of another shape", "are of another shape"),
        (nonfinite, "holds NaN or infinite numbers", "hold NaN or infinite numbers"),
    )
    lines = [
        f"{counted(len(names), *words)}: {few_of(names, _SHOWN)}"
        for names, *words in problems
        if names
    ]
    if lines:
        raise ValueError(f"{path} does not fit the networks here: {'; '.join(lines)}")
    return lora


def write_lora(
    lora: Lora,
    path: str | os.PathLike,
    trees: Mapping[str, PyTree],
    layout: LoraLayout,
    *,
    dtype: Any = None,
) -> None:
    """Write a new .safetensors file.

    "peft" is what diffusers and PEFT read and write; their files have no alphas, so `up` is
    multiplied by alpha / rank where that is not 1. "kohya" is what the scripts of kohya and most
    programs with a user interface read; an SDXL network has the names of generative-models there,
    and a DiT has none.
    dtype: of the factors, None for their own.
    Raises ValueError for layers that the layout has no names for, and what save_weights raises.
    """
    names, kernels = names_of(trees, layout), {s: leaves_of(tree) for s, tree in trees.items()}
    lost = [f"{spot.slot}/{spot.part.path}" for spot in lora if spot not in names]
    if lost:
        raise ValueError(
            f"{counted(len(lost), 'layer has', 'layers have')} no names in the layout {layout}: "
            f"{few_of(lost, _SHOWN)}"
        )
    tensors: dict[str, np.ndarray] = {}
    for spot, factors in lora.items():
        is_conv = len(_kernel_shape(kernels, spot)) > 2
        own = names[spot]
        for name, share in zip(own, _shares(factors, len(own)), strict=True):
            tensors |= _tensors(name, share, layout, is_conv=is_conv)
    if dtype is not None:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    save_weights(path, [], tensors, _metadata(lora) if layout == "kohya" else {})


def merge_lora(trees: Mapping[str, PyTree], lora: Lora, weight: float = 1.0) -> dict[str, PyTree]:
    """Add a LoRA to the kernels of networks, in float32; they keep their dtypes and shardings.

    weight: how much of the change, 1 for all of it.
    """
    changes: dict[tuple[str, str], list[tuple[int | None, Factors]]] = {}
    for (slot, part), factors in lora.items():
        changes.setdefault((slot, part.path), []).append((part.index, factors))

    def merged(slot: str, path: Any, leaf: Any) -> Any:
        own = changes.get((slot, "/".join(entry.key for entry in path)), [])
        for index, factors in own:
            if index is None:
                leaf = _changed(leaf, factors, weight)
            else:
                leaf = leaf.at[index].set(_changed(leaf[index], factors, weight))
        return leaf

    return {
        slot: jax.tree_util.tree_map_with_path(lambda p, x, s=slot: merged(s, p, jnp.asarray(x)), t)
        for slot, t in trees.items()
    }


def extract_lora(
    base: Mapping[str, PyTree], tuned: Mapping[str, PyTree], ranks: Mapping[Spot, int]
) -> Lora:
    """Approximate what training changed of kernels by factors of given ranks (SVD of W' - W).

    The factors are the best ones in the sum of squares (Eckart & Young 1936).
    """
    trees = {slot: (leaves_of(base[slot]), leaves_of(tuned[slot])) for slot in base}
    lora = {}
    for (slot, part), rank in ranks.items():
        before, after = (np.asarray(tree[part.path], np.float32) for tree in trees[slot])
        change = after - before if part.index is None else (after - before)[part.index]
        left, sizes, right = np.linalg.svd(
            change.reshape(-1, change.shape[-1]), full_matrices=False
        )
        roots = np.sqrt(sizes[:rank])
        down = (left[:, :rank] * roots).reshape(*change.shape[:-1], len(roots))
        lora[Spot(slot, part)] = Factors(down, roots[:, None] * right[:rank], float(len(roots)))
    return lora


def magnitude_of(kernel: Any, relative: Any) -> np.ndarray:
    """Multiply relative norms by the norms of a kernel's columns."""
    return np.asarray(jnp.asarray(relative) * column_norms(jnp.asarray(kernel, jnp.float32)))


def _changed(kernel: Any, factors: Factors, weight: float) -> Any:
    return _compute(kernel, factors.down, factors.up, factors.magnitude, factors.scale, weight)


@jax.jit
def _compute(
    kernel: Array, down: Array, up: Array, magnitude: Array | None, scale: Any, weight: Any
) -> Array:
    before = kernel.astype(jnp.float32)
    relative = None if magnitude is None else magnitude / column_norms(before)
    change = merged_kernel(before, down, scale * up.astype(jnp.float32), relative) - before
    return (before + weight * change).astype(kernel.dtype)


def _sort(
    weights: Weights, places: Mapping[tuple[str, str], Place]
) -> tuple[dict[Place, tuple[str, dict[str, str]]], list[str]]:
    """Sort the tensors of a file by place: {it: (module, {role: name})}, and the unknown ones."""
    held: dict[Place, tuple[str, dict[str, str]]] = {}
    counts: dict[Spot, int] = {}
    unknown = []
    for name in weights.tensors:
        role, module = role_of(name)
        place = None if role is None else places.get(plain_name(module))
        twice = place is not None and (
            (place in held and role in held[place][1])
            or counts.setdefault(place.spot, place.shares) != place.shares
        )
        if place is None or role is None or twice:
            unknown.append(name)
        else:
            held.setdefault(place, (module, {}))[1][role] = name
    return held, unknown


def _joined(shares: Mapping[int, Factors], count: int) -> Factors | None:
    """Join factors of equal shares of a layer's outputs; None where only some have magnitudes.

    Shares with one `down` and alpha keep them; others lie beside each other, and the ranks add up.
    A share that is not there gets zeros.
    """
    if count == 1:
        return shares[0]
    parts = [shares[number] for number in sorted(shares)]
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    if magnitudes and len(magnitudes) < count:
        return None
    magnitude = np.concatenate(magnitudes) if magnitudes else None
    first = parts[0]
    alike = [p.alpha == first.alpha and np.array_equal(p.down, first.down) for p in parts]
    if len(parts) == count and all(alike):
        up = np.concatenate([part.up for part in parts], axis=1)
        return Factors(first.down, up, first.alpha, magnitude)
    down = np.concatenate([part.down for part in parts], axis=-1)
    width, row = first.up.shape[1], 0
    up = np.zeros((down.shape[-1], count * width), first.up.dtype)
    for number, part in sorted(shares.items()):
        end = row + part.down.shape[-1]
        up[row:end, number * width : (number + 1) * width] = part.scale * part.up
        row = end
    return Factors(down, up, float(row), magnitude)


def _shares(factors: Factors, count: int) -> list[Factors]:
    """Split the outputs of a layer into equal shares, each with the whole `down`."""
    down, up, alpha, magnitude = factors
    magnitudes = [None] * count if magnitude is None else np.split(magnitude, count)
    ups = np.split(up, count, axis=1)
    return [Factors(down, own, alpha, norm) for own, norm in zip(ups, magnitudes, strict=True)]


def _kernel_shape(kernels: Mapping[str, Mapping[str, Any]], spot: Spot) -> tuple[int, ...]:
    shape = tuple(kernels[spot.slot][spot.part.path].shape)
    return shape if spot.part.index is None else shape[1:]


def _factors(
    arrays: Mapping[str, np.ndarray], kernel: tuple[int, ...], scale: float
) -> Factors | str:
    """Turn the arrays of a file into factors for a kernel; a string tells what does not fit."""
    down, up = arrays["down"], arrays["up"]
    rank = down.shape[0] if down.ndim else 0
    shapes = f"{down.shape} and {up.shape} (the kernel here is {kernel})"
    if down.ndim < 2 or up.ndim < 2 or rank < 1 or any(side != 1 for side in up.shape[2:]):
        return shapes
    down = to_ours(down, "kernel")
    if all(side == 1 for side in (*kernel[:-2], *down.shape[:-2])):
        down = down.reshape(*kernel[:-2], *down.shape[-2:])  # a 1 x 1 convolution is a dense layer
    if down.shape != (*kernel[:-1], rank) or up.shape[:2] != (kernel[-1], rank):
        return shapes
    magnitude = arrays["magnitude"].reshape(-1) if "magnitude" in arrays else None
    if magnitude is not None and magnitude.shape != kernel[-1:]:
        return f"magnitude {arrays['magnitude'].shape} ({kernel[-1:]} here)"
    alpha = float(arrays["alpha"].reshape(-1)[0]) if "alpha" in arrays else scale * rank
    return Factors(down, up.reshape(up.shape[:2]).T, alpha, magnitude)


def _said_scale(weights: Weights, prefix: str, module: str) -> float:
    """Read alpha / rank of a module out of the words that diffusers writes; 1 without them."""
    if _ADAPTER_METADATA not in weights.metadata:
        return 1.0
    settings = json.loads(weights.metadata[_ADAPTER_METADATA])

    def of(pattern: str, default: str) -> float:
        for ending, value in settings.get(f"{prefix}.{pattern}", {}).items():
            if module == ending or module.endswith(f".{ending}"):
                return float(value)
        return float(settings.get(f"{prefix}.{default}", 1.0))

    alpha, rank = of("alpha_pattern", "lora_alpha"), of("rank_pattern", "r")
    return alpha / (np.sqrt(rank) if settings.get(f"{prefix}.use_rslora") else rank)


def _tensors(
    module: str, factors: Factors, layout: LoraLayout, *, is_conv: bool
) -> dict[str, np.ndarray]:
    """Name the arrays of a layer as a layout does, with the axes of PyTorch."""
    down, up, alpha, magnitude = factors
    down, up = to_file(down, "kernel"), up.T
    if is_conv:
        up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
    if layout == "peft":
        scaled = up if factors.scale == 1.0 else (up.astype(np.float32) * factors.scale)
        found = {"lora_A.weight": down, "lora_B.weight": scaled.astype(up.dtype)}
        shape = (1, -1, *(1,) * (down.ndim - 2)) if is_conv else (-1,)
        extra = {} if magnitude is None else {"lora_magnitude_vector": magnitude.reshape(shape)}
    else:
        found = {"lora_down.weight": down, "lora_up.weight": up}
        found["alpha"] = np.asarray(alpha, down.dtype)
        shape = (-1, *(1,) * (down.ndim - 1))
        extra = {} if magnitude is None else {"dora_scale": magnitude.reshape(shape)}
    return {f"{module}.{name}": array for name, array in (found | extra).items()}


def _metadata(lora: Lora) -> dict[str, str]:
    """Say what kohya's scripts say of their files: the largest rank, and its alpha."""
    largest = max(lora.values(), key=lambda factors: factors.down.shape[-1])
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(largest.down.shape[-1]),
        "ss_network_alpha": f"{largest.alpha:g}",
    }
