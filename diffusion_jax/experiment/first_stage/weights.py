"""The training of a first stage from and to other programs' files, LPIPS' weights among them."""

import dataclasses
import os
import pathlib
import re
import zipfile
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.convert.weights.first_stage import (
    has_lpips,
    import_first_stage,
    import_lpips,
    join_parts,
    save_first_stage,
)
from diffusion_jax.convert.weights.identify import find_network
from diffusion_jax.convert.weights.importing import open_network
from diffusion_jax.convert.weights.inflating import inflated
from diffusion_jax.convert.weights.reading import Weights, is_safetensors, open_weights
from diffusion_jax.experiment.files.weights import RANDOM
from diffusion_jax.experiment.task import Trained, Training
from diffusion_jax.models.first_stage.autoencoder import Autoencoder, Fields
from diffusion_jax.models.first_stage.lpips import load_lpips
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.train.checkpoints.checksums import named_leaves, path_name
from diffusion_jax.train.checkpoints.warm_start import warm_start
from diffusion_jax.types import PyTree

FIRST_STAGE_LAYOUT = "first stage of latent-diffusion"
# A part of the names of layers over time, in the files of generative-models and of diffusers.
_OVER_TIME = re.compile(r"time_stack|time_mix|temporal_res_block|time_conv_out")


def load_first_stage(
    params: PyTree, mutable: PyTree, path: str | os.PathLike, training: Training
) -> tuple[PyTree, PyTree, list[str]]:
    """Start a first stage from another program's file -> (params, mutable, parts it had not).

    The autoencoder and its codebook have to be there; the discriminator with its running statistics
    and a learned logvar are taken where they are. training.ckpt_ema takes the averages of the
    autoencoder. Raises ValueError when the file does not fit; the message lists what is missing or
    left over.
    """
    found = import_first_stage(
        params,
        mutable,
        open_network(path, "vae", variant=training.ckpt_variant),
        ema=training.ckpt_ema,
        ignore_keys=training.ignore_keys,
        nonfinite=not training.ckpt_check,
    )
    return found.params, found.mutable, found.not_loaded


def load_video_first_stage(
    module: VideoAutoencoder,
    params: PyTree,
    mutable: PyTree,
    path: str | os.PathLike,
    training: Training,
) -> tuple[PyTree, PyTree, list[str]]:
    """Start a first stage of videos from a file, see load_first_stage.

    A file of an autoencoder of images fits, too: see inflated for its convolutions around the
    latent. The layers over time then keep their initial values, with which they change nothing.
    """
    weights = open_network(path, "vae", variant=training.ckpt_variant)
    found = import_first_stage(
        {**params, "autoencoder": _held(module, params["autoencoder"], weights)},
        mutable,
        weights,
        ema=training.ckpt_ema,
        ignore_keys=training.ignore_keys,
        nonfinite=not training.ckpt_check,
    )
    given = inflated(found.params["autoencoder"], use_quant_conv=module.use_quant_conv)
    own = {"autoencoder": params["autoencoder"]}
    loaded = warm_start(own, path, given={"autoencoder": given})
    absent = [*found.not_loaded, *loaded.not_loaded]
    return {**found.params, **loaded.params}, found.mutable, absent


def _held(module: VideoAutoencoder, params: PyTree, weights: Weights) -> dict[str, PyTree]:
    """Choose what to read of a file: what it holds of params, and convolutions beside the latent.

    Without layers over time it is read as an autoencoder of images.
    """
    start = find_network(weights.tensors, "vae", weights.path).prefix
    names = [name.removeprefix(start) for name in weights.tensors if name.startswith(start)]
    fields = {field.name: getattr(module, field.name) for field in dataclasses.fields(Fields)}
    side = 2 ** (len(module.ch_mult) - 1)
    image = Autoencoder(**fields, embed_dim=module.embed_dim)
    example = jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32)
    whole = jax.eval_shape(image.init, jax.random.key(0), example)["params"]
    held = dict(params)
    if not any(_OVER_TIME.search(name) for name in names):
        own = named_leaves(params)
        pick = lambda path, leaf: own[path_name(path)] if path_name(path) in own else leaf
        held = jax.tree_util.tree_map_with_path(pick, whole)
    for name in ("quant_conv", "post_quant_conv"):
        if name in params or any(tensor.startswith(f"{name}.") for tensor in names):
            held.setdefault(name, whole[name])
        else:
            held.pop(name, None)
    return held


def export_first_stage(
    trained: Trained, path: str | os.PathLike, *, dtype: Any = None, nonfinite: bool = False
) -> str:
    """Write one .safetensors file as latent-diffusion writes the checkpoint of a first stage.

    trained.ema: averages that are written as model_ema.* beside the others. Returns the name of the
    layout. Raises ValueError for another suffix than .safetensors.
    """
    frozen = trained.frozen
    tree = join_parts(
        trained.params,
        trained.mutable,
        logvar=frozen["logvar"] if "logvar" in frozen else None,
        lpips=frozen["lpips"],
    )
    ema = None if trained.ema is None else trained.ema["autoencoder"]
    save_first_stage(path, tree, dtype=dtype, ema=ema, nonfinite=nonfinite)
    return FIRST_STAGE_LAYOUT


def check_lpips(net: str, own: str | None, source: str | None) -> None:
    """Find out, before any long work, whether LPIPS has weights; see read_lpips for the arguments.

    Raises FileNotFoundError for a missing file, ValueError for one that does not fit the network.
    """
    if own == RANDOM:
        return
    if own is not None and not pathlib.Path(os.path.expanduser(own)).is_file():
        raise FileNotFoundError(f"config.perceptual.weights = {own!r} does not exist")
    read_lpips(net, own, source)


def read_lpips(net: str, own: str | None, source: str | os.PathLike | None) -> PyTree:
    """Read LPIPS from its own file, else from a released checkpoint, else from the package."""
    if own is None and not _in_source(source):
        return load_lpips(None, net=net)
    assert own is not None or source is not None
    path = pathlib.Path(os.path.expanduser(own if own is not None else str(source)))
    # The package has files of its own; PyTorch's are zip archives.
    if is_safetensors(path) or zipfile.is_zipfile(path):
        return import_lpips(open_weights(path), net)
    return load_lpips(path, net=net)


def _in_source(source: str | os.PathLike | None) -> bool:
    path = None if source is None else pathlib.Path(os.path.expanduser(source))
    return path is not None and path.is_file() and has_lpips(open_weights(path))
