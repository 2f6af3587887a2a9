"""The `adapters` section -> which weights of a denoising network are trained or frozen."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.devices.partition import Rule
from diffusion_jax.experiment.binding import ConfigError, Section, bind_section, choices
from diffusion_jax.experiment.layout import adapter_rules, base_rules, frozen_rules, state_rules
from diffusion_jax.experiment.lora import lora_of, ranks_of
from diffusion_jax.experiment.network import Network
from diffusion_jax.experiment.options import AdaptedLayers, AdapterOptions, LatentCacheOptions
from diffusion_jax.experiment.sampling import Whole
from diffusion_jax.experiment.task import Adapters, Trained, Training
from diffusion_jax.experiment.weights import Reading, is_released, load_frozen, load_released
from diffusion_jax.models.unet.options import half_kernels
from diffusion_jax.train.adapters import Adapter, Wanted, adapt, choose_layers, init_adapters, merge
from diffusion_jax.train.checkpoints.warm_start import warm_start
from diffusion_jax.types import PyTree

ADAPTERS = Section(
    "config.adapters",
    "Train low-rank adapters (LoRA) of the weights of train.ckpt_path, and nothing else.",
    ((AdapterOptions, ()),),
)
LAYERS = Section(
    "config.adapters.layers.NAME",
    "Layers that get adapters of one size; of several that are found, the first one decides.",
    ((AdaptedLayers, ()),),
)
# What is folded into the key of frozen weights for a random base.
_BASE = 2**31 - 1
# What the names of layers mean without a pattern.
PATTERNS = {
    "attention": r"^network/.*/(to_[qkv]|to_out_0|qkv)$",
    "feed_forward": r"^network/.*/ff(_in)?/net_(0/proj|2)$",
    "convolution": r"^network/.*(in_layers_2|out_layers_3|skip_connection|/op|/conv)$",
    "text": r"^conditioner/.*/self_attn/(([qkv]|out)_proj)$",
}


class Parts(NamedTuple):
    """Which weights of a denoising network are trained, and which are frozen.

    init, init_frozen: key -> the former and the latter, random. whole: see Whole. merged:
    (Trained, dtype of the file or None) -> Trained, whose params are whole. The others: see Task.
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


def make_parts(
    network: Network, mesh: Mesh, training: Training, sections: Mapping[str, Any]
) -> Parts:
    """Decide by the `adapters` section what is trained: adapters, or without it the network.

    Raises ConfigError for a wrong option, and for a pattern that is found in no layer.
    """
    reading = Reading(training.ckpt_check, training.ckpt_variant)
    if sections["adapters"] is not None:
        return _adapted(network, mesh, training, reading, sections)
    return Parts(
        init=network.init,
        init_frozen=network.init_frozen,
        whole=lambda params, frozen: (params, frozen),
        merged=lambda trained, dtype: trained,
        rules=state_rules(network, mesh),
        frozen_rules=frozen_rules(network, mesh),
        load_frozen=functools.partial(load_frozen, network, reading=reading),
        load_released=functools.partial(load_released, network),
    )


def _adapted(
    network: Network,
    mesh: Mesh,
    training: Training,
    reading: Reading,
    sections: Mapping[str, Any],
) -> Parts:
    options = AdapterOptions(**bind_section(ADAPTERS, sections["adapters"]).own[0])
    wanted = _wanted(options)
    if training.gradient_dtype != "float32":
        raise ConfigError(
            f"config.train.gradient_dtype = {training.gradient_dtype!r} should be 'float32' with "
            "config.adapters, whose gradients are small"
        )

    @functools.cache
    def found() -> tuple[PyTree, dict[str, Adapter]]:  # tracing takes seconds, and many need it not
        key = jax.random.key(0)
        shapes = _base(jax.eval_shape(network.init, key), jax.eval_shape(network.init_frozen, key))
        return shapes, _choose(shapes, wanted, sections["latent_cache"])

    def init(key: jax.Array) -> PyTree:
        return {"adapters": init_adapters(key, *found(), dora=options.dora)}

    def init_frozen(key: jax.Array) -> PyTree:
        frozen = network.init_frozen(key)
        own = network.init(jax.random.fold_in(key, _BASE))
        return {**frozen, **_kept(network, _base(own, frozen))}

    def whole(params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        base = {name: frozen[name] for name in ("network", "conditioner")}
        adapted = adapt(base, params["adapters"], found()[1], dropout=options.dropout)
        rest = {name: leaf for name, leaf in params.items() if name != "adapters"}
        return {**rest, **adapted}, {**frozen, "conditioner": {}}

    def merged(trained: Trained, dtype: Any) -> Trained:
        kernels = None if dtype is None else jnp.float32  # to be rounded once, by the file
        params, frozen = whole(trained.params, trained.frozen)
        params = merge(params, kernels)
        ema = trained.ema
        ema = None if ema is None else merge(whole(ema, trained.frozen)[0], kernels)
        return Trained(params, trained.mutable, frozen, ema)

    return Parts(
        init=init,
        init_frozen=init_frozen,
        whole=whole,
        merged=merged,
        rules=adapter_rules(mesh),
        frozen_rules=base_rules(network, mesh),
        load_frozen=functools.partial(_load_frozen, network, training, reading),
        load_released=lambda params, mutable, path, training: (params, mutable, []),
        adapters=Adapters(
            lambda trained: lora_of(network, found()[1], trained),
            lambda base: ranks_of(network, found()[1], base),
        ),
    )


def _base(params: PyTree, frozen: PyTree) -> PyTree:
    """Join the network and all its embedders, whichever of them are trained without adapters."""
    conditioner = {**frozen["conditioner"], **params["conditioner"]}
    return {"network": params["network"], "conditioner": conditioner}


def _kept(network: Network, base: PyTree) -> PyTree:
    """Round what the network rounds itself, so that a base takes half the memory."""
    if jnp.dtype(getattr(network.module, "dtype", jnp.float32)) != jnp.bfloat16:
        return base
    return {**base, "network": half_kernels(base["network"])}


def _wanted(options: AdapterOptions) -> dict[str, Wanted]:
    """Bind the sections of layers -> {what messages call a pattern: the pattern and its size}."""
    wanted = {}
    for name, section in options.layers.items():
        path = f"config.adapters.layers.{name}"
        own = AdaptedLayers(**bind_section(LAYERS._replace(path=path), section).own[0])
        if own.pattern is None and name not in PATTERNS:
            raise ConfigError(
                f"{path}.pattern is missing; without one, {choices(name, PATTERNS)} as the name"
            )
        pattern = PATTERNS[name] if own.pattern is None else own.pattern
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{path}.pattern = {pattern!r} should be a regular expression: {error}"
            ) from error
        rank = options.rank if own.rank is None else own.rank
        alpha = options.alpha if own.alpha is None else own.alpha
        scale = 1.0 if alpha is None else alpha / rank
        wanted[f"{path}.pattern"] = Wanted(pattern, Adapter(rank, scale))
    if not wanted:
        raise ConfigError(f"config.adapters.layers = {{}} should name {', '.join(PATTERNS)}, ...")
    return wanted


def _choose(
    shapes: PyTree, wanted: Mapping[str, Wanted], cache: Mapping[str, Any] | None
) -> dict[str, Adapter]:
    try:
        chosen = choose_layers(shapes, wanted)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    texts = [path for path in chosen if path.startswith("conditioner/")]
    if cache is not None and texts and ({**LatentCacheOptions("")._asdict(), **cache})["text"]:
        raise ConfigError(
            f"config.latent_cache.text = True should be False: config.adapters changes {texts[0]}"
        )
    return chosen


def _load_frozen(
    network: Network,
    training: Training,
    reading: Reading,
    abstract: PyTree,
    random: Callable[[], PyTree],
    source: Any,
) -> PyTree:
    """Load the base, out of a released file or the run of train.ckpt_path, and the rest."""
    names = jax.eval_shape(network.init, jax.random.key(0))["conditioner"]
    conditioner = abstract["conditioner"]
    own = {name: conditioner[name] for name in names}
    others = {name: conditioner[name] for name in conditioner if name not in names}
    frozen = load_frozen(network, {**abstract, "conditioner": others}, random, source, reading)
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
    return {**frozen, **_base(placed, frozen)}
