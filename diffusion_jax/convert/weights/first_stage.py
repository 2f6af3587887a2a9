"""The training checkpoint of a first stage: autoencoder, codebook, discriminator, logvar and LPIPS.

latent-diffusion and generative-models keep all of them in one file, as encoder.*, quantize.*,
loss.discriminator.main.*, loss.logvar and loss.perceptual_loss.*. Here they are joined to one tree
with these names before a file is written, and split again after one was read.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.convert.weights.exporting import export_params, save_weights
from diffusion_jax.convert.weights.first_stage_names import DISCRIMINATOR, LOGVAR, LPIPS
from diffusion_jax.convert.weights.identify import find_network
from diffusion_jax.convert.weights.importing import import_network, import_params
from diffusion_jax.convert.weights.names import file_tensors
from diffusion_jax.convert.weights.reading import Weights
from diffusion_jax.models.first_stage.lpips import BACKBONES, SCALE, SHIFT, param_shapes
from diffusion_jax.types import PyTree

TRAINING = "first_stage_ldm"


class Imported(NamedTuple):
    """What was read of a first stage's TrainState, and the parts that the file did not have."""

    params: PyTree
    mutable: PyTree
    not_loaded: list[str]


def join_parts(
    params: PyTree, mutable: PyTree, *, logvar: Any = None, lpips: PyTree = None
) -> dict[str, Any]:
    """Join the parts of a first stage into the tree that a training checkpoint is.

    params, mutable: fields of its TrainState. logvar: a fixed logvar, which is no parameter here.
    """
    autoencoder = dict(params["autoencoder"])
    if "codebook" in mutable["regularizer"]:
        autoencoder["quantize"] = mutable["regularizer"]["codebook"]
    statistics = mutable["discriminator"].get("batch_stats", {})
    discriminator = {
        name: {**own, **statistics.get(name, {})} for name, own in params["discriminator"].items()
    }
    fixed = {"logvar": logvar, "perceptual_loss": lpips}
    loss = {name: tree for name, tree in fixed.items() if tree is not None} | params["loss"]
    return {**autoencoder, "loss": {"discriminator": discriminator, **loss}}


def split_parts(tree: Mapping[str, Any], params: PyTree, mutable: PyTree) -> tuple[PyTree, PyTree]:
    """Undo join_parts: split its tree into params and mutable of the given structures."""
    loss = tree["loss"]
    sources = {"autoencoder": tree, "discriminator": loss["discriminator"], "loss": loss}
    own = {name: _like(params[name], sources[name]) for name in params}
    codebook = {"codebook": tree["quantize"]} if "quantize" in tree else {}
    return own, {
        "regularizer": _like(mutable["regularizer"], codebook),
        "discriminator": _like(mutable["discriminator"], {"batch_stats": loss["discriminator"]}),
    }


def import_first_stage(
    params: PyTree,
    mutable: PyTree,
    weights: Weights,
    *,
    ema: bool = False,
    ignore_keys: Sequence[str] = (),
    nonfinite: bool = False,
) -> Imported:
    """Read a training checkpoint into the dtypes and shardings of a first stage's TrainState.

    params, mutable: its fields, arrays. The autoencoder has to be in the file; the discriminator
    and logvar may be missing as a whole and keep their values then. A logvar that is not learned
    here, LPIPS and the counters of norms are not looked at. ema: read the averages that the file
    keeps of the autoencoder. ignore_keys, nonfinite: see importing.Rules.
    Raises ValueError, naming what is missing, left over or of another shape.
    """
    found = find_network(weights.tensors, "vae", weights.path)
    tree = join_parts(params, mutable)
    parts = [DISCRIMINATOR, *([LOGVAR] if "logvar" in params["loss"] else [])]
    absent = [part for part in parts if not _has(weights, found.prefix + part)]
    patterns = tuple(part.replace(".", r"\.") for part in absent)
    if found.name_map == "vae_ldm":
        tree = import_params(
            tree,
            weights,
            TRAINING,
            prefix=found.prefix,
            ignore_keys=ignore_keys,
            allow_missing=(*ignore_keys, *patterns),
            allow_unused=() if "logvar" in params["loss"] else (LOGVAR.replace(".", r"\."),),
            nonfinite=nonfinite,
        )
    else:
        own = {name: leaf for name, leaf in tree.items() if name != "loss"}
        tree |= import_network(
            own,
            weights,
            "vae",
            ignore_keys=ignore_keys,
            allow_missing=ignore_keys,
            nonfinite=nonfinite,
        )
    new, after = split_parts(tree, params, mutable)
    if ema:
        own = import_network(
            new["autoencoder"],
            weights,
            "vae",
            ema=True,
            ignore_keys=ignore_keys,
            nonfinite=nonfinite,
        )
        new = {**new, "autoencoder": own}
    return Imported(new, after, [part.rstrip(".") for part in absent])


def import_lpips(weights: Weights, net: str) -> PyTree:
    """Read LPIPS from a training checkpoint or a file of its own -> parameters of models.lpips.

    net: the backbone, a name in lpips.BACKBONES. All leaves are float32.
    Raises ValueError where there is no LPIPS, or one with another backbone.
    """
    if not has_lpips(weights):
        raise ValueError(
            f"{weights.path} holds no weights of LPIPS (names like lin0.model.1.weight)"
        )
    prefix = LPIPS if _has(weights, LPIPS) else ""
    for other in set(BACKBONES) - {net}:
        tensors = file_tensors(_lpips_shapes(other), "lpips")
        if all(prefix + tensor.name in weights.tensors for tensor in tensors):
            raise ValueError(
                f"{weights.path} holds LPIPS over {other}, and config.perceptual.net is {net!r}"
            )
    return import_params(_lpips_shapes(net), weights, "lpips", prefix=prefix)


def has_lpips(weights: Weights) -> bool:
    """Whether a file holds weights of LPIPS."""
    return any(name.removeprefix(LPIPS).startswith("lin0.") for name in weights.tensors)


def save_first_stage(
    path: str | os.PathLike,
    tree: PyTree,
    *,
    dtype: Any = None,
    ema: PyTree = None,
    nonfinite: bool = False,
) -> None:
    """Write a tree of join_parts as the originals write their training checkpoint.

    The constants and counters that the originals keep in it are written too. ema: averages of the
    autoencoder, written beside it under the names model_ema.*. nonfinite: see export_params.
    Raises what save_weights raises.
    """
    exported = [export_params(tree, TRAINING, dtype=dtype, nonfinite=nonfinite)]
    if ema is not None:
        own = export_params(ema, "vae_ldm", dtype=dtype, ema=True, nonfinite=nonfinite)
        exported.append(own)
    save_weights(path, exported, _buffers(tree["loss"]))


def _buffers(loss: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Make what torch keeps beside parameters: counters, flags and the constants of LPIPS."""
    found = {}
    for name, own in loss["discriminator"].items():
        place = f"{DISCRIMINATOR}{name.replace('_', '.')}."
        if "running_mean" in own:
            found[f"{place}num_batches_tracked"] = np.zeros((), np.int64)
        if "loc" in own:
            found[f"{place}initialized"] = np.ones((), np.uint8)
    if "perceptual_loss" in loss:
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            constant = np.asarray(values, np.float32).reshape(1, 3, 1, 1)
            found[f"{LPIPS}scaling_layer.{name}"] = constant
    return found


def _lpips_shapes(net: str) -> PyTree:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        param_shapes(net),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _has(weights: Weights, start: str) -> bool:
    return any(name.startswith(start) for name in weights.tensors)


def _like(wanted: PyTree, source: Mapping[str, Any]) -> PyTree:
    """Pick the leaves of a nested dictionary by the names of another one."""
    return {
        name: _like(value, source[name]) if isinstance(value, Mapping) else source[name]
        for name, value in wanted.items()
    }
