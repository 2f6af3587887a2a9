"""The `adapters` section -> low-rank adapters, which are trained beside a frozen network."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.convert.weights.lora import Lora
from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_section, choices
from diffusion_jax.experiment.config.options import (
    AdaptedLayers,
    AdapterOptions,
    LatentCacheOptions,
)
from diffusion_jax.experiment.files.lora import adapters_of, lora_of, ranks_of, read_adapters
from diffusion_jax.experiment.network.layout import adapter_rules, base_rules
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.parts import (
    Parts,
    base_of,
    check_gradients,
    init_base,
    load_base,
)
from diffusion_jax.experiment.task import Adapters, Trained, Training
from diffusion_jax.train.adapters import Adapter, Wanted, adapt, choose_layers, init_adapters, merge
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
# What the names of layers mean without a pattern.
PATTERNS = {
    "attention": r"^network/.*/(to_[qkv]|to_out_0|qkv|attn_(qkv|proj))$",
    "feed_forward": r"^network/.*/(ff(_in)?/net_(0/proj|2)|mlp_fc[12])$",
    "convolution": r"^network/.*(in_layers_2|out_layers_3|skip_connection|/op|/conv)$",
    "text": r"^conditioner/.*/self_attn/(([qkv]|out)_proj)$",
}


def adapted(network: Network, mesh: Mesh, training: Training, sections: Mapping[str, Any]) -> Parts:
    """Train adapters, and nothing else.

    Raises ConfigError for a wrong option, and for a pattern that is found in no layer.
    """
    options = AdapterOptions(**bind_section(ADAPTERS, sections["adapters"]).own[0])
    wanted = _wanted(options)
    check_gradients(training, ADAPTERS.path)

    @functools.cache
    def found() -> tuple[PyTree, dict[str, Adapter]]:  # tracing takes seconds, and many need it not
        key = jax.random.key(0)
        shapes = base_of(
            jax.eval_shape(network.init, key), jax.eval_shape(network.init_frozen, key)
        )
        return shapes, _choose(shapes, wanted, sections["latent_cache"])

    def init(key: jax.Array) -> PyTree:
        return {"adapters": init_adapters(key, *found(), dora=options.dora)}

    def whole(params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        base = {name: frozen[name] for name in ("network", "conditioner")}
        adapted = adapt(base, params["adapters"], found()[1], dropout=options.dropout)
        rest = {name: leaf for name, leaf in params.items() if name != "adapters"}
        return {**rest, **adapted}, frozen

    def merged(trained: Trained, dtype: Any) -> Trained:
        kernels = None if dtype is None else jnp.float32  # to be rounded once, by the file
        params, frozen = whole(trained.params, trained.frozen)
        params = merge(params, kernels)
        ema = trained.ema
        ema = None if ema is None else merge(whole(ema, trained.frozen)[0], kernels)
        return Trained(params, trained.mutable, frozen, ema)

    def read(base: PyTree) -> Lora | None:
        if options.from_file is None:
            return None
        return read_adapters(network, found()[1], options.from_file, base, dora=options.dora)

    def first_params(params: PyTree, frozen: PyTree) -> PyTree:
        lora = read(frozen)
        if lora is None:
            return params
        own = adapters_of(network, found()[1], lora, params["adapters"], frozen)
        return {**params, "adapters": own}

    return Parts(
        init=init,
        init_frozen=functools.partial(init_base, network),
        whole=whole,
        merged=merged,
        rules=adapter_rules(mesh),
        frozen_rules=base_rules(network, mesh),
        load_frozen=functools.partial(load_base, network, training),
        load_released=lambda params, mutable, path, training: (params, mutable, []),
        adapters=Adapters(
            lambda trained: lora_of(network, found()[1], trained),
            lambda base: ranks_of(network, found()[1], base),
        ),
        needs_base=ADAPTERS.path,
        first_params=first_params,
        check_files=lambda: options.from_file and read(found()[0]),
    )


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
