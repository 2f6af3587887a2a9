"""The training checkpoint of a first stage: autoencoder, codebook, discriminator, logvar and LPIPS.

latent-diffusion and generative-models keep all of them in one file: encoder.*, quantize.*,
loss.discriminator.main.*, loss.logvar and loss.perceptual_loss.*; here they are one tree for that.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.convert.weights.exporting import Exported, export_params, save_weights
from diffusion_jax.convert.weights.first_stage_names import DISCRIMINATOR, LOGVAR, LPIPS
from diffusion_jax.convert.weights.identify import find_network
from diffusion_jax.convert.weights.importing import import_network, import_params
from diffusion_jax.convert.weights.names import FileTensor, file_tensors
from diffusion_jax.convert.weights.reading import Weights
from diffusion_jax.models.first_stage.lpips import BACKBONES, SCALE, SHIFT, param_shapes
from diffusion_jax.types import PyTree

TRAINING = "first_stage_ldm"


class Imported(NamedTuple):
    """The params and the mutable collections of a first stage's TrainState, as far as a file had
    them, and the parts that it had not."""

    params: PyTree
    mutable: PyTree
    not_loaded: list[str]


def join_parts(
    params: PyTree, mutable: PyTree, *, logvar: Any = None, lpips: PyTree = None
) -> dict[str, Any]:
    """Join the parts of a first stage into the tree that a training checkpoint is.

    params, mutable: those of its TrainState. logvar: a fixed one, which is no parameter here.
    """
    autoencoder = dict(params["autoencoder"])
    if "codebook" in mutable["regularizer"]:
        autoencoder["quantize"] = mutable["regularizer"]["codebook"]
    statistics = mutable["discriminator"]
    statistics = statistics["batch_stats"] if "batch_stats" in statistics else {}
    discriminator = {
        name: {**own, **(statistics[name] if name in statistics else {})}
        for name, own in params["discriminator"].items()
    }
    loss: dict[str, Any] = {"discriminator": discriminator}
    if "logvar" in params["loss"] or logvar is not None:
        loss["logvar"] = params["loss"]["logvar"] if "logvar" in params["loss"] else logvar
    if lpips is not None:
        loss["perceptual_loss"] = lpips
    return {**autoencoder, "loss": loss}


def split_parts(tree: Mapping[str, Any], params: PyTree, mutable: PyTree) -> tuple[PyTree, PyTree]:
    """Take a tree of join_parts apart into params and mutable of the same structure."""
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
) -> Imported:
    """Read what a file has of a first stage's training into dtypes and shardings of params and
    mutable, arrays.

    The autoencoder has to be there, the discriminator and logvar may be missing as a whole and keep
    their values then. A logvar that is not learned here, LPIPS and the counters of norms are not
    looked at. ema takes the averages that the file keeps of the autoencoder. ignore_keys: see
    import_params. Raises ValueError, naming what is missing, left over or of another shape.
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
        )
    else:
        own = {name: leaf for name, leaf in tree.items() if name != "loss"}
        own = import_network(
            own, weights, "vae", ignore_keys=ignore_keys, allow_missing=ignore_keys
        )
        tree = {**tree, **own}
    new, after = split_parts(tree, params, mutable)
    if ema:
        own = import_network(new["autoencoder"], weights, "vae", ema=True, ignore_keys=ignore_keys)
        new = {**new, "autoencoder": own}
    return Imported(new, after, [part.rstrip(".") for part in absent])


def import_lpips(weights: Weights, net: str) -> PyTree:
    """Read LPIPS out of a first stage's training checkpoint, or a file of its own -> parameters of
    models.lpips, float32.

    Raises ValueError where there is none, or that of another net.
    """
    if not has_lpips(weights):
        raise ValueError(
            f"{weights.path} holds no weights of LPIPS (names like lin0.model.1.weight)"
        )
    prefix = LPIPS if _has(weights, LPIPS) else ""
    for other in set(BACKBONES) - {net}:
        if all(prefix + tensor.name in weights.tensors for tensor in _lpips_tensors(other)):
            raise ValueError(
                f"{weights.path} holds LPIPS over {other}, and config.perceptual.net is {net!r}"
            )
    return import_params(_lpips_shapes(net), weights, "lpips", prefix=prefix)


def has_lpips(weights: Weights) -> bool:
    """Whether a file holds weights of LPIPS."""
    return any(name.removeprefix(LPIPS).startswith("lin0.") for name in weights.tensors)


def save_first_stage(
    path: str | os.PathLike, tree: PyTree, *, dtype: Any = None, ema: PyTree = None
) -> None:
    """Write a tree of join_parts as the originals write their training checkpoint, with the
    constants and counters that they have among it.

    ema: averages of the autoencoder, written as model_ema.* twins.
    Raises what save_weights raises.
    """
    exported: list[Exported] = [export_params(tree, TRAINING, dtype=dtype)]
    if ema is not None:
        exported.append(export_params(ema, "vae_ldm", dtype=dtype, ema=True))
    save_weights(path, exported, _buffers(tree["loss"]))


def _buffers(loss: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What torch keeps beside parameters: counters, flags and the constants of LPIPS."""
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
    def shape(leaf: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf, np.float32)

    return jax.tree.map(shape, param_shapes(net), is_leaf=lambda node: isinstance(node, tuple))


def _lpips_tensors(net: str) -> list[FileTensor]:
    return file_tensors(_lpips_shapes(net), "lpips")


def _has(weights: Weights, start: str) -> bool:
    return any(name.startswith(start) for name in weights.tensors)


def _like(wanted: PyTree, source: Mapping[str, Any]) -> PyTree:
    """Pick the leaves of a nested dictionary by the names of another one."""
    return {
        name: _like(value, source[name]) if isinstance(value, Mapping) else source[name]
        for name, value in wanted.items()
    }
