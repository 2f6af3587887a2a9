"""The `inversion` section -> new tokens, whose vectors are trained and nothing else."""

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.convert.weights.embeddings import (
    CLIP_G,
    CLIP_L,
    Embedding,
    write_embedding,
)
from diffusion_jax.data.new_tokens import with_new_tokens
from diffusion_jax.experiment.config.binding import ConfigError, Section, bind_each
from diffusion_jax.experiment.config.options import LatentCacheOptions, NewTokenOptions
from diffusion_jax.experiment.network.layout import adapter_rules, base_rules
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.parts import Parts, check_gradients, init_base, load_base
from diffusion_jax.experiment.task import Trained, Training
from diffusion_jax.models.conditioning.clip import ADDED
from diffusion_jax.models.conditioning.text_embedders import ClipText, OpenClipText
from diffusion_jax.types import PyTree

INVERSION = Section(
    "config.inversion.NAME",
    "A new token, whose vectors are trained beside the weights of train.ckpt_path (inversion).",
    ((NewTokenOptions, ()),),
)
LAYOUT = "embedding"
_PATH = "config.inversion"
_SLOTS = {ClipText: CLIP_L, OpenClipText: CLIP_G}


class _Encoder(NamedTuple):
    """A text encoder: its name, what files call it, and the size of its table of tokens."""

    name: str
    slot: str | None
    vocab_size: int
    width: int


def bind_tokens(section: Mapping[str, Any]) -> dict[str, NewTokenOptions]:
    """Bind the sections of all new tokens, by name; ConfigError for a wrong option."""
    bound = {}
    for name, own in bind_each(INVERSION, section, "a token, such as toy").items():
        options = NewTokenOptions(**own)
        if not options.init.split():
            raise ConfigError(
                f"{_PATH}.{name}.init = {options.init!r} should be words to begin with"
            )
        bound[name] = options._replace(
            token=f"<{name}>" if options.token is None else options.token
        )
    return bound


def knowing_tokens(network: Network, section: Mapping[str, Any] | None) -> Network:
    """Let the tokenizers of a network know the new tokens of a config.

    Raises ConfigError for a wrong option, a token that exists already, and a network without text.
    """
    if section is None:
        return network
    options = bind_tokens(section)
    if not _encoders(network):
        raise ConfigError(
            f"{_PATH} is for models whose text encoders are clip_text, open_clip_text"
        )
    counts: dict[str, int] = {}
    for name, own in options.items():
        token = own.token
        assert token is not None
        if token in counts:
            raise ConfigError(f"{_PATH}.{name}.token = {token!r} is the token of another section")
        try:
            _knowing(network, {token: own.vectors})
        except ValueError as error:
            raise ConfigError(f"{_PATH}.{name}: {error}") from error
        counts[token] = own.vectors
    return _knowing(network, counts)


def inverted(
    network: Network, mesh: Mesh, training: Training, sections: Mapping[str, Any]
) -> Parts:
    """Train the vectors of new tokens, and nothing else; ConfigError for what stands against it.

    Source: Gal et al. 2022 (arXiv:2208.01618), section 3.
    """
    options, encoders = bind_tokens(sections["inversion"]), _encoders(network)
    check_gradients(training, _PATH)
    cache = sections["latent_cache"]
    if cache is not None and {**LatentCacheOptions("")._asdict(), **cache}["text"]:
        raise ConfigError(f"config.latent_cache.text = True should be False with {_PATH}")

    def init(key: jax.Array) -> PyTree:
        del key  # they begin with vectors of the base, see first_params
        return {
            "embeddings": {
                encoder.name: {
                    name: jnp.zeros((own.vectors, encoder.width)) for name, own in options.items()
                }
                for encoder in encoders
            }
        }

    def whole(params: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
        conditioner = dict(frozen["conditioner"])
        for name, own in params["embeddings"].items():
            vectors = [own[token] for token in options]
            conditioner[name] = _with_vectors(conditioner[name], vectors, [])
        rest = {name: leaf for name, leaf in params.items() if name != "embeddings"}
        return {**rest, "network": frozen["network"], "conditioner": conditioner}, frozen

    return Parts(
        init=init,
        init_frozen=functools.partial(init_base, network),
        whole=whole,
        merged=lambda trained, dtype: trained,
        rules=adapter_rules(mesh),
        frozen_rules=base_rules(network, mesh),
        load_frozen=functools.partial(load_base, network, training),
        load_released=lambda params, mutable, path, training: (params, mutable, []),
        needs_base=_PATH,
        first_params=functools.partial(_first_params, network, options),
        export_file=functools.partial(_export_file, encoders, options),
        export_folder=_export_folder,
        layout=LAYOUT,
    )


def with_embedding(
    network: Network, params: PyTree, frozen: PyTree, embedding: Embedding
) -> tuple[Network, PyTree, PyTree]:
    """Add the vectors of a new token to a model -> (network, params, frozen).

    Raises ValueError for a token that exists already, and for vectors of another model.
    """
    encoders, given = _encoders(network), embedding.vectors
    wanted = {encoder.slot: encoder.width for encoder in encoders}
    found = {slot: own.shape[-1] for slot, own in given.items()}
    if found != wanted:
        sizes = [
            " and ".join(
                f"{size} numbers" + (f" for {slot}" if slot else "") for slot, size in sides.items()
            )
            or "none"
            for sides in (found, wanted)
        ]
        raise ValueError(
            f"the vectors of {embedding.token!r} have {sizes[0]}; this model reads {sizes[1]}"
        )
    count = len(next(iter(given.values())))
    network = _knowing(network, {embedding.token: count})
    sides = [params, frozen]
    for name, slot, _, _ in encoders:
        side = int("conditioner" not in params or name not in params["conditioner"])
        held = sides[side]["conditioner"]
        own = _with_vectors(held[name], [], [given[slot]])
        sides[side] = {**sides[side], "conditioner": {**held, name: own}}
    return network, sides[0], sides[1]


def _with_vectors(encoder: PyTree, before: list[Any], after: list[Any]) -> PyTree:
    """Put vectors before and after the ones that an encoder has for other new tokens."""
    table = encoder["embeddings"]
    held = [table[ADDED]] if ADDED in table else []
    dtype = table["token_embedding"]["embedding"].dtype
    vectors = [jnp.asarray(own, dtype) for own in (*before, *held, *after)]
    return {**encoder, "embeddings": {**table, ADDED: jnp.concatenate(vectors)}}


def _encoders(network: Network) -> list[_Encoder]:
    found = [
        (name, embedder.module)
        for name, embedder in network.embedders.items()
        if isinstance(embedder.module, ClipText | OpenClipText)
    ]
    return [
        _Encoder(
            name,
            _SLOTS[type(module)] if len(found) > 1 else None,
            module.tower.vocab_size,
            module.tower.width,
        )
        for name, module in found
    ]


def _knowing(network: Network, counts: Mapping[str, int]) -> Network:
    tokenize = dict(network.tokenize)
    for encoder in _encoders(network):
        key = network.embedders[encoder.name].input_key
        source, own = network.tokenize[key]
        tokenize[key] = source, with_new_tokens(own, counts, encoder.vocab_size)
    return network._replace(tokenize=tokenize)


def _first_params(
    network: Network, options: Mapping[str, NewTokenOptions], params: PyTree, frozen: PyTree
) -> PyTree:
    """Begin with the vectors of the tokens of `init`, one after the other."""
    embeddings = {}
    for name, own in params["embeddings"].items():
        table = frozen["conditioner"][name]["embeddings"]["token_embedding"]["embedding"]
        tokenize = network.tokenize[network.embedders[name].input_key][1].plain()
        embeddings[name] = {}
        for token, like in own.items():
            words = options[token].init
            ids = tokenize([words])[0][1 : int(tokenize.num_tokens([words])[0]) - 1]
            rows = np.resize(ids, len(like))
            vectors = jnp.asarray(table[rows], like.dtype)
            embeddings[name][token] = jax.device_put(vectors, like.sharding)
    return {**params, "embeddings": embeddings}


def _export_file(
    encoders: list[_Encoder],
    options: Mapping[str, NewTokenOptions],
    trained: Trained,
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    nonfinite: bool = False,
) -> str:
    del nonfinite  # read_embedding takes none
    if len(options) > 1:
        raise ConfigError(
            f"{_PATH} has {', '.join(options)}, and a file holds one token: leave one of them in "
            "the config; --format=native writes all of a model"
        )
    if trained.ema is not None:
        raise ConfigError("a file of a token has no place for averages: leave --with_ema out")
    ((name, own),) = options.items()
    assert own.token is not None
    held = trained.params["embeddings"]
    vectors = {slot: np.asarray(held[encoder][name]) for encoder, slot, _, _ in encoders}
    write_embedding(path, Embedding(own.token, vectors), dtype=dtype)
    return LAYOUT


def _export_folder(trained: Trained, folder: str | os.PathLike, **options: Any) -> None:
    del trained, options
    raise ConfigError(f"{folder} should end in .safetensors: {_PATH} trains the vectors of a token")
