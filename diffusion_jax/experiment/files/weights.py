"""Weights of a diffusion model and of its frozen networks, out of released files and runs."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.convert.weights.claims import read_claims
from diffusion_jax.convert.weights.diffusers_folder import unused_of_penultimate
from diffusion_jax.convert.weights.diffusers_video import fold_quant_conv
from diffusion_jax.convert.weights.importing import count_networks, import_network, open_network
from diffusion_jax.convert.weights.inflating import with_quant_conv
from diffusion_jax.convert.weights.native import read_about, read_tree
from diffusion_jax.convert.weights.reading import (
    INDEXES,
    TORCH_SUFFIXES,
    diffusers_components,
    open_weights,
    variants_of,
)
from diffusion_jax.devices.mesh import on_mesh, replicated
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.claims import check_first_stage_claims
from diffusion_jax.experiment.first_stage.regularizer import CODEBOOK
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.task import Training
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.conditioning.text_embedders import ClipText, OpenClipImage, OpenClipText
from diffusion_jax.models.conditioning.video_embedders import EncodedFrames
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.unet.multiview_unet import MultiviewUNet
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.models.unet.video_unet import VideoUNet
from diffusion_jax.randomness import Stream, sample_keys, stream_key
from diffusion_jax.train.checkpoints.checksums import path_name
from diffusion_jax.train.checkpoints.reading import load_mutable, load_params, resolve_checkpoint
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted

RANDOM = "random"
# What convert calls the network of a module.
KINDS: dict[type[nn.Module], str] = {
    UNet: "unet",
    VideoUNet: "unet",
    MultiviewUNet: "unet",
    DiT: "dit",
    Autoencoder: "vae",
    ClipText: "clip text",
    OpenClipText: "clip text",
    OpenClipImage: "clip vision",
    EncodedFrames: "vae",
}
# What an autoencoder has that an encoder of frames does not need.
DECODER = (r"decoder\.", r"post_quant_conv\.")


class Reading(NamedTuple):
    """How released files are read: train.ckpt_check and train.ckpt_variant."""

    check: bool = True
    variant: str | None = None


CHECKED = Reading()


def is_released(path: str | os.PathLike) -> bool:
    """Tell whether a path is a released file or folder of diffusers, and no run of this program.

    A native file counts as a run.
    """
    path = pathlib.Path(os.path.expanduser(path))
    if path.is_dir():
        return bool(diffusers_components(path) or variants_of(path))
    if read_about(path) is not None:
        return False
    return path.is_file() or path.name.lower().endswith((".safetensors", *TORCH_SUFFIXES, *INDEXES))


def load_released(
    network: Network, params: PyTree, mutable: PyTree, path: str | os.PathLike, training: Training
) -> tuple[PyTree, PyTree, list[str]]:
    """Read trained parameters out of a released file -> (params, mutable, what was not in it).

    params: {"network": ..., "conditioner": ...}, arrays, or shapes where the file has everything;
    the result has their dtypes and shardings. mutable is returned as it is. The options of training
    say what is taken: ckpt_ema, ignore_keys, load_only_unet, keep_dims.
    Raises ValueError when the file does not fit; the message lists what is missing or left over.
    """
    reading = Reading(training.ckpt_check, training.ckpt_variant)
    kind = denoiser_kind(network)
    found = import_network(
        params["network"],
        open_network(path, kind, variant=reading.variant),
        kind,
        ema=training.ckpt_ema,
        ignore_keys=training.ignore_keys,
        allow_missing=training.ignore_keys,
        keep_dims=training.keep_dims,
        nonfinite=not reading.check,
    )
    conditioner = dict(params["conditioner"])
    not_loaded = ["logvar"] if "logvar" in params else []
    for name, own in conditioner.items():
        if training.load_only_unet or type(network.embedders[name].module) not in KINDS:
            not_loaded.append(f"conditioner/{name}")
        else:
            conditioner[name] = _import_embedder(network, name, own, path, reading)
    return {**params, "network": found, "conditioner": conditioner}, mutable, not_loaded


def load_own_weights(network: Network, params: PyTree, reading: Reading = CHECKED) -> PyTree:
    """Read the encoders that are trained and have a file with their weights, into params.

    Without such an encoder these are the same params.
    Raises ValueError when a file does not fit.
    """
    conditioner = {
        name: _import_embedder(network, name, own, None, reading)
        for name, own in params["conditioner"].items()
        if _own_file(network.embedders[name].weights) is not None
    }
    if not conditioner:
        return params
    return {**params, "conditioner": {**params["conditioner"], **conditioner}}


def denoiser_kind(network: Network) -> str:
    """Say what convert calls the network that denoises; a user's own is looked for as a UNet."""
    module = type(network.module)
    return KINDS[module] if module in KINDS else "unet"


def check_frozen(network: Network, source: str | None, reading: Reading = CHECKED) -> None:
    """Find out, before any long work, whether every frozen network has weights.

    source: a released checkpoint that training starts from, or None.
    Raises ConfigError when nothing says where they are, FileNotFoundError when a file is missing,
    ValueError when the one of the first stage contradicts the config.
    """
    for path, weights in _frozen_networks(network):
        if weights is None and source is None:
            raise ConfigError(
                f"{path}.weights is not set: name a file with its weights, '{RANDOM}' for a dry "
                "run, or set config.train.ckpt_path to a released checkpoint that holds them"
            )
        if weights not in (None, RANDOM) and not pathlib.Path(os.path.expanduser(weights)).exists():
            raise FileNotFoundError(f"{path}.weights = {weights!r} does not exist")
    _check_first_stage(network, reading)


def _check_first_stage(network: Network, reading: Reading) -> None:
    stage = network.first_stage
    own = None if stage is None else _own_file(stage.options.weights)
    if stage is not None and own is not None and reading.check and is_released(own):
        check_first_stage_claims(stage, own)


def load_frozen(
    network: Network,
    abstract: PyTree,
    random: Callable[[], PyTree],
    source: str | os.PathLike | None,
    reading: Reading = CHECKED,
) -> PyTree:
    """Load the frozen networks of a diffusion model into the shapes and shardings of abstract.

    A network's own `weights` file comes first, then source, a released checkpoint, then random
    weights where the config asks for them.
    Raises ValueError when a file does not fit.
    """
    weights = [own for _, own in _frozen_networks(network)]
    drawn = random() if source is None and RANDOM in weights else None
    conditioner = {}
    for name, own in abstract["conditioner"].items():
        if source is not None or _own_file(network.embedders[name].weights) is not None:
            conditioner[name] = _import_embedder(network, name, own, source, reading)
        else:
            assert drawn is not None  # check_frozen has asked
            conditioner[name] = drawn["conditioner"][name]
    frozen: dict[str, Any] = {"conditioner": conditioner}
    frozen["first_stage"] = _first_stage(network, abstract["first_stage"], source, drawn, reading)
    if network.first_stage is not None and network.first_stage.options.scale_by_std:
        # 1 until the first batch was seen, where no file says what an earlier one gave.
        claimed = None if source is None else read_claims(source).scale_factor
        frozen["scale_factor"] = jnp.float32(1.0 if claimed is None else claimed)
    return frozen


def scale_by_std(
    network: Network, mesh: Mesh, seed: int, frozen: PyTree, batch: Mapping[str, jax.Array]
) -> PyTree:
    """Set the scale factor in frozen to 1 / std of a batch's latents, so that they have variance 1.

    A factor that a released file gave stays.
    Source: latent-diffusion, LatentDiffusion.on_train_batch_start.
    """
    if float(frozen["scale_factor"]) != 1.0:
        return frozen
    count = len(next(iter(batch.values())))
    keys = sample_keys(stream_key(seed, Stream.LATENT_SCALE), jnp.arange(count))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def factor(frozen: PyTree, batch: Mapping[str, jax.Array], keys: jax.Array) -> jax.Array:
        frozen = {**frozen, "scale_factor": jnp.float32(1.0)}
        return 1.0 / jnp.std(network.encode(frozen, batch, keys), ddof=1)

    return {**frozen, "scale_factor": factor(frozen, batch, keys)}


def _import_embedder(
    network: Network, name: str, own: PyTree, source: str | os.PathLike | None, reading: Reading
) -> PyTree:
    """Read an embedder's encoder out of its own file, or out of a whole checkpoint.

    It is the n-th of its kind in both, or among those without a file of their own where the
    checkpoint holds no others.
    """
    embedders = network.embedders
    where = f"config.conditioning.embedders.{name}"
    kind = _kind(embedders[name].module, where)
    path = _own_file(embedders[name].weights)
    unused = DECODER if isinstance(embedders[name].module, EncodedFrames) else ()
    if path is not None:
        if _is_run(path) and unused:
            return _run_weights(pathlib.Path(os.path.expanduser(path)), own, where)
        return import_network(own, path, kind, allow_unused=unused, nonfinite=not reading.check)
    assert source is not None
    same = [n for n, e in embedders.items() if KINDS.get(type(e.module)) == kind]
    here = [n for n in same if _own_file(embedders[n].weights) is None]
    count = count_networks(source, kind, variant=reading.variant)
    number = here.index(name) if count == len(here) else same.index(name)
    if number >= count:
        raise ValueError(
            f"{source} holds {counted(count, 'network', 'networks')} of the kind {kind!r}, and "
            f"{where} needs number {number + 1}; set {where}.weights to a file that has it"
        )
    weights = open_network(source, kind, number, variant=reading.variant)
    is_folder = pathlib.Path(os.path.expanduser(source)).is_dir()
    return import_network(
        own,
        weights,
        kind,
        number=None if is_folder else number,
        zeros=_left_out_by_diffusers(embedders[name]) if is_folder else (),
        allow_unused=unused,
        nonfinite=not reading.check,
    )


def _left_out_by_diffusers(embedder: Embedder) -> tuple[str, ...]:
    """Name what diffusers does not store of SD 2's text encoder, which never uses it."""
    module = embedder.module
    if not (isinstance(module, OpenClipText) and module.legacy and module.layer == "penultimate"):
        return ()
    return unused_of_penultimate(module.tower.num_layers)


def _first_stage(
    network: Network,
    abstract: PyTree,
    source: str | os.PathLike | None,
    drawn: Any,
    reading: Reading,
) -> PyTree:
    stage = network.first_stage
    if stage is None:
        return {}
    own = _own_file(stage.options.weights)
    path = source if own is None else own
    if path is None:
        return drawn["first_stage"]
    if _is_run(path):
        return _run_weights(pathlib.Path(os.path.expanduser(path)), abstract, "config.first_stage")
    _check_first_stage(network, reading)
    weights = open_network(path, "vae", variant=reading.variant if own is None else None)
    read = functools.partial(import_network, kind="vae", nonfinite=not reading.check)
    ends = [
        name for name in ("quant_conv", "post_quant_conv") if f"{name}.weight" in weights.tensors
    ]
    if ends != ["quant_conv"] or "quant_conv" in abstract or "encoder" not in abstract:
        return read(abstract, weights)
    # Folders of diffusers have this convolution, which the encoder of the released files includes.
    leaf = abstract["encoder"]["conv_out"]["bias"]
    shapes = {"kernel": (1, 1, *leaf.shape, *leaf.shape), "bias": leaf.shape}
    after = {
        name: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
        for name, shape in shapes.items()
    }
    return fold_quant_conv(read({**abstract, "quant_conv": after}, weights))


def _kind(module: nn.Module, where: str) -> str:
    if type(module) not in KINDS:
        raise ConfigError(
            f"{where}: weights of {type(module).__name__} cannot be read from a released file"
        )
    return KINDS[type(module)]


def _own_file(weights: str | None) -> str | None:
    return None if weights == RANDOM else weights


def _frozen_networks(network: Network) -> list[tuple[str, str | None]]:
    """List (path in the config, weights) of every frozen network that has parameters."""
    has_weights = jax.eval_shape(network.init_frozen, jax.random.key(0))["conditioner"]
    found = [
        (f"config.conditioning.embedders.{name}", network.embedders[name].weights)
        for name in has_weights
    ]
    if network.first_stage is not None:
        found.append(("config.first_stage", network.first_stage.options.weights))
    return found


def released_source(training: Training) -> str | None:
    """Return train.ckpt_path when it names released weights, and not a run of this program."""
    path = training.ckpt_path
    return path if path is not None and is_released(path) else None


def native_trees(path: str | os.PathLike, *, ema: bool = False) -> tuple[PyTree, PyTree] | None:
    """Read a native file -> (parameters, mutable collections) of NumPy arrays; None for others.

    ema: the averages that are kept beside raw parameters, in the place of those that they follow.
    """
    if read_about(path) is None:
        return None
    weights = open_weights(os.path.expanduser(path))
    params = read_tree(weights, "params/") | (read_tree(weights, "ema/") if ema else {})
    return params, read_tree(weights, "mutable/")


def _is_run(path: str | os.PathLike) -> bool:
    folder = pathlib.Path(os.path.expanduser(path))
    return read_about(folder) is not None or (folder.is_dir() and not is_released(folder))


def _run_weights(path: pathlib.Path, abstract: PyTree, where: str) -> PyTree:
    """Read the averaged autoencoder of a first stage's run into shapes and shardings.

    Without a decoder in abstract there is none of the run's. where: what the weights are for.
    """
    native = native_trees(path, ema=True)
    if native is None:
        workdir, step = resolve_checkpoint(path)
        params = load_params(workdir / "checkpoints", step=step)
        averages = load_mutable(workdir / "checkpoints", step=step)
    else:
        params, averages = native
    if "autoencoder" not in params:
        raise ValueError(f"{path} is a run that trained no first stage: it has {sorted(params)}")
    own = params["autoencoder"]
    if CODEBOOK in abstract and "regularizer" in averages:  # ema_vq has its codes there
        codes = averages["regularizer"]["codebook"]["embedding"]
        own = {**own, CODEBOOK: {"embedding": codes}}
    if "decoder" not in abstract:
        own = {name: own[name] for name in ("encoder", "quant_conv") if name in own}
        if "quant_conv" in abstract:
            own = with_quant_conv(own)
    wanted, found = (
        {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (abstract, own)
    )
    different = [
        name
        for name in sorted(wanted.keys() | found.keys())
        if name not in wanted or name not in found or wanted[name].shape != found[name].shape
    ]
    if different:
        raise ValueError(
            f"the first stage of {path} differs from {where}: {len(different)} "
            f"parameters differ, among them {', '.join(different[:4])}"
        )
    return jax.tree.map(
        lambda leaf, value: jax.device_put(value.astype(leaf.dtype), leaf.sharding), abstract, own
    )
