"""The training of a first stage from and to other programs' files, LPIPS' weights among them."""

import os
import pathlib
import zipfile
from typing import Any

from diffusion_jax.convert.weights.diffusers_folder import save_diffusers, vae_config
from diffusion_jax.convert.weights.first_stage import (
    has_lpips,
    import_first_stage,
    import_lpips,
    join_parts,
    save_first_stage,
)
from diffusion_jax.convert.weights.importing import open_network
from diffusion_jax.convert.weights.reading import is_safetensors, open_weights
from diffusion_jax.experiment.binding import ConfigError
from diffusion_jax.experiment.regularizer import CODEBOOK
from diffusion_jax.experiment.task import Trained, Training
from diffusion_jax.experiment.weights import RANDOM
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.lpips import load_lpips
from diffusion_jax.types import PyTree

FIRST_STAGE_LAYOUT = "first stage of latent-diffusion"


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


def export_first_stage_folder(
    module: Autoencoder,
    regularizer: str,
    trained: Trained,
    folder: str | os.PathLike,
    *,
    dtype: Any = None,
    nonfinite: bool = False,
) -> None:
    """Write a folder of diffusers with the autoencoder alone, an AutoencoderKL or a VQModel.

    regularizer: its name in the config. Raises ConfigError for a quantizer that diffusers lacks,
    ValueError for such an option.
    """
    if regularizer not in ("kl", "vq"):
        raise ConfigError(
            f"config.regularizer.name = {regularizer!r} has no counterpart in diffusers, which has "
            "kl and vq; export this network as .safetensors"
        )
    own = trained.params["autoencoder"]
    codes = own[CODEBOOK]["embedding"].shape[0] if regularizer == "vq" else None
    config = vae_config(module, scale_factor=1.0, num_codes=codes)
    save_diffusers(
        folder, {"first_stage": own}, {"first_stage": config}, dtype=dtype, nonfinite=nonfinite
    )


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
