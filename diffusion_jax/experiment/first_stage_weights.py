"""The training of a first stage from and to other programs' files, LPIPS' weights among them."""

import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

from diffusion_jax.convert.weights.diffusers_folder import save_diffusers, vae_config
from diffusion_jax.convert.weights.first_stage import (
    has_lpips,
    import_first_stage,
    import_lpips,
    join_parts,
    save_first_stage,
)
from diffusion_jax.convert.weights.reading import Weights, open_weights
from diffusion_jax.experiment.autoencoding import Autoencoding
from diffusion_jax.experiment.binding import ConfigError
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.regularizer import CODEBOOK
from diffusion_jax.models.first_stage.lpips import load_lpips
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree

RANDOM = "random"


def load_first_stage(
    state: TrainState,
    weights: Weights,
    *,
    ema: bool = False,
    ignore_keys: Sequence[str] = (),
) -> tuple[TrainState, list[str]]:
    """Start a first stage from the file of another program -> (state, parts that it had not).

    The autoencoder and its codebook have to be there; the discriminator with its running statistics
    and a learned logvar are taken where they are. ema: the averages of the autoencoder.
    Raises ValueError when the file does not fit; the message lists what is missing or left over.
    """
    found = import_first_stage(
        state.params, state.mutable, weights, ema=ema, ignore_keys=ignore_keys
    )
    return state._replace(params=found.params, mutable=found.mutable), found.not_loaded


def export_first_stage(
    state: TrainState,
    frozen: PyTree,
    path: str | os.PathLike,
    *,
    averaged: PyTree = None,
    dtype: Any = None,
    twins: bool = False,
) -> None:
    """Write one .safetensors file as latent-diffusion writes the checkpoint of a first stage.

    averaged: the parameters with the averages; they are what is written, or with twins written as
    model_ema.* beside the others. Raises ValueError for another suffix than .safetensors.
    """
    params = state.params if averaged is None or twins else averaged
    ema = None if averaged is None or not twins else averaged["autoencoder"]
    tree = join_parts(
        params,
        state.mutable,
        logvar=frozen["logvar"] if "logvar" in frozen else None,
        lpips=frozen["lpips"],
    )
    save_first_stage(path, tree, dtype=dtype, ema=ema)


def export_first_stage_folder(
    experiment: Experiment, params: PyTree, folder: str | os.PathLike, *, dtype: Any = None
) -> None:
    """Write a folder of diffusers with the autoencoder alone, an AutoencoderKL or a VQModel.

    Raises ConfigError for a quantizer that diffusers lacks, ValueError for such an option.
    """
    task = experiment.task
    assert isinstance(task, Autoencoding)
    section = experiment.sections["regularizer"] if "regularizer" in experiment.sections else {}
    name = section["name"] if "name" in section else "kl"
    if name not in ("kl", "vq"):
        raise ConfigError(
            f"config.regularizer.name = {name!r} has no counterpart in diffusers, which has kl and "
            "vq; export this network as .safetensors"
        )
    own = params["autoencoder"]
    codes = own[CODEBOOK]["embedding"].shape[0] if name == "vq" else None
    config = vae_config(task.module, scale_factor=1.0, num_codes=codes)
    save_diffusers(folder, {"first_stage": own}, {"first_stage": config}, dtype=dtype)


def check_lpips_source(task: Autoencoding, source: str | os.PathLike | None) -> None:
    """Find out, before any long work, whether LPIPS has weights; source: a released checkpoint that
    training starts from. Raises FileNotFoundError, ValueError when what is there does not fit."""
    path = task.lpips_weights
    if path == RANDOM:
        return
    if path is not None and not pathlib.Path(path).expanduser().exists():
        raise FileNotFoundError(f"config.perceptual.weights = {path!r} does not exist")
    read_lpips(task, source)


def read_lpips(task: Autoencoding, source: str | os.PathLike | None) -> PyTree:
    """Read LPIPS from its own file, else from the released checkpoint, else from the package."""
    own, net = task.lpips_weights, task.lpips_net
    if own is None and not _in_source(source):
        return load_lpips(None, net=net)
    assert own is not None or source is not None
    path = pathlib.Path(own if own is not None else str(source)).expanduser()
    # The package's files end in .ckpt as those of PyTorch do, which are zip archives.
    if path.suffix == ".safetensors" or zipfile.is_zipfile(path):
        return import_lpips(open_weights(path), net)
    return load_lpips(path, net=net)


def _in_source(source: str | os.PathLike | None) -> bool:
    path = None if source is None else pathlib.Path(source).expanduser()
    return path is not None and path.is_file() and has_lpips(open_weights(path))
