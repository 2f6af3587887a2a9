"""Which weights of a denoising network are trained, and which are frozen."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.devices.partition import Rule
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.files.weights import Reading, is_released, load_frozen, load_released
from diffusion_jax.experiment.network.layout import frozen_rules, state_rules
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.sampling import Whole
from diffusion_jax.experiment.task import Adapters, Trained, Training
from diffusion_jax.models.unet.options import half_kernels
from diffusion_jax.train.checkpoints.warm_start import warm_start
from diffusion_jax.types import PyTree

# What is folded into the key of frozen weights for a random base.
_BASE = 2**31 - 1


class Parts(NamedTuple):
    """Which weights of a denoising network are trained, and which are frozen.

    init, init_frozen: key -> the former and the latter, random. whole: see Whole. merged:
    (Trained, dtype of the file or None) -> Trained, whose params are whole. needs_base: the section
    that says so where train.ckpt_path is a part of what is frozen. layout: of a file for what is
    trained alone. check_files: raises what is wrong with files that first_params reads. The others:
    see Task.
    """

    init: Callable[[jax.Array], PyTree]
    init_frozen: Callable[[jax.Array], PyTree]
    whole: Whole
    merged: Callable[[Trained, Any], Trained]
    rules: Sequence[Rule]
    frozen_rules: Sequence[Rule]
    load_frozen: Callable[..., PyTree]
    load_released: Callable[..., tuple[PyTree, PyTree, list[str]]]
    adapters: Adapters | None = None
    needs_base: str | None = None
    first_params: Callable[[PyTree, PyTree], PyTree] | None = None
    export_file: Callable[..., str] | None = None
    export_folder: Callable[..., None] | None = None
    layout: str | None = None
    check_files: Callable[[], object] = lambda: None


def all_trained(network: Network, mesh: Mesh, training: Training) -> Parts:
    """Train the network, and its embedders but for the frozen ones."""
    return Parts(
        init=network.init,
        init_frozen=network.init_frozen,
        whole=lambda params, frozen: (params, frozen),
        merged=lambda trained, dtype: trained,
        rules=state_rules(network, mesh),
        frozen_rules=frozen_rules(network, mesh),
        load_frozen=functools.partial(load_frozen, network, reading=reading_of(training)),
        load_released=functools.partial(load_released, network),
    )


def reading_of(training: Training) -> Reading:
    """Tell how released files are read."""
    return Reading(training.ckpt_check, training.ckpt_variant)


def base_of(params: PyTree, frozen: PyTree) -> PyTree:
    """Join the network and all its embedders, whichever of them are trained without a base."""
    conditioner = {**frozen["conditioner"], **params["conditioner"]}
    return {"network": params["network"], "conditioner": conditioner}


def init_base(network: Network, key: jax.Array) -> PyTree:
    """Make random frozen weights, with the network and all embedders among them.

    Kernels that the network rounds itself are rounded here, so that they take half the memory.
    """
    frozen = network.init_frozen(key)
    base = base_of(network.init(jax.random.fold_in(key, _BASE)), frozen)
    if jnp.dtype(getattr(network.module, "dtype", jnp.float32)) == jnp.bfloat16:
        base = {**base, "network": half_kernels(base["network"])}
    return {**frozen, **base}


def load_base(
    network: Network,
    training: Training,
    abstract: PyTree,
    random: Callable[[], PyTree],
    source: Any,
) -> PyTree:
    """Load what init_base makes, out of a released file or the run of train.ckpt_path."""
    names = jax.eval_shape(network.init, jax.random.key(0))["conditioner"]
    conditioner = abstract["conditioner"]
    own = {name: conditioner[name] for name in names}
    others = {name: conditioner[name] for name in conditioner if name not in names}
    read = {**abstract, "conditioner": others}
    frozen = load_frozen(network, read, random, source, reading_of(training))
    shapes = {"network": abstract["network"], "conditioner": own}
    path = training.ckpt_path if source is None else source
    assert path is not None  # check_sources has asked
    if is_released(path):
        base, _, absent = load_released(network, shapes, {}, path, training)
    else:
        base, absent, _ = warm_start(shapes, path, ema=training.ckpt_ema)
    if absent:
        raise ConfigError(f"config.train.ckpt_path = {str(path)!r} has no {', '.join(absent[:4])}")
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), base, shapes)
    return {**frozen, **base_of(placed, frozen)}


def check_gradients(training: Training, section: str) -> None:
    """Raise ConfigError where gradients would be rounded beside a base that is frozen."""
    if training.gradient_dtype != "float32":
        raise ConfigError(
            f"config.train.gradient_dtype = {training.gradient_dtype!r} should be 'float32' with "
            f"{section}, whose gradients are small"
        )
