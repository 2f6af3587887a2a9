"""The `regularizer` section of a first stage: what stands between its encoder and its decoder."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.experiment.binding import ConfigError, bind, row
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    Quantized,
    VectorQuantizer,
)
from diffusion_jax.models.first_stage.regularizers import gaussian_regularizer, identity_regularizer
from diffusion_jax.randomness import noise_like
from diffusion_jax.train.lr_schedules import LR_SCHEDULES
from diffusion_jax.types import Keys, PyTree


def gaussian(moments: Array, keys: Keys) -> tuple[Array, dict[str, Array]]:
    """Sample the latents of a Gaussian posterior, and log the divergence of each sample from
    N(0, 1), so that padding in a batch can count for nothing."""
    noise = noise_like(keys, (*moments.shape[1:-1], moments.shape[-1] // 2))
    return gaussian_regularizer(moments, noise)


WITHOUT_PARAMETERS = {"kl": gaussian, "identity": identity_regularizer}
QUANTIZERS: dict[str, type[nn.Module]] = {
    "vq": VectorQuantizer,
    "ema_vq": EMAVectorQuantizer,
    "gumbel": GumbelQuantizer,
}
REGULARIZERS = WITHOUT_PARAMETERS | QUANTIZERS
# Name of a codebook in the parameters of an autoencoder, as in the released files.
CODEBOOK = "quantize"
_GIVEN = ("moments", "keys", "noise", "n_e", "e_dim", "n_embed", "embedding_dim", "num_hiddens")


class Regularizer(NamedTuple):
    """init: key -> (parameters or {}, mutable or {}). apply: (params of the autoencoder, mutable,
    moments, keys, *, train, step) -> (z, log, mutable); the number of the step is for schedules."""

    init: Callable[[Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[Array, Mapping[str, Array], PyTree]]


def build_regularizer(section: Mapping[str, Any], module: Autoencoder) -> Regularizer:
    """Build the regularizer of an autoencoder; ConfigError for a wrong option, or one that does not
    fit what the encoder makes."""
    path = "config.regularizer"
    kind = row(REGULARIZERS, section, path)
    two = section["name"] == "kl"
    if two != module.double_z:
        raise ConfigError(
            f"config.model.double_z = {module.double_z} should be {two}: {path}.name = "
            f"{section['name']!r} reads {'mean and variance' if two else 'one value'} for "
            "each latent"
        )
    if section["name"] in WITHOUT_PARAMETERS:
        bind(kind, section, path, given=_GIVEN)
        return Regularizer(lambda key: ({}, {}), _plain(kind))
    return _quantizer(section, module, path)


def _plain(regularize: Callable) -> Callable:
    def apply(
        params: PyTree,
        mutable: PyTree,
        moments: Array,
        keys: Keys,
        *,
        train: bool,
        step: Array | None = None,
    ) -> tuple[Array, Mapping[str, Array], PyTree]:
        del params, train, step
        z, log = regularize(moments.astype(jnp.float32), keys)
        return z, log, mutable

    return apply


def _quantizer(section: Mapping[str, Any], module: Autoencoder, path: str) -> Regularizer:
    own = dict(section)
    num_codes = own.pop("num_codes") if "num_codes" in own else 8192
    kind = QUANTIZERS[own["name"]]
    temperature_at = _temperature(own, path)
    options = bind(kind, own, path, given=_GIVEN)
    codes = (module.embed_dim,)
    sizes = {
        "vq": {"n_e": num_codes, "e_dim": module.embed_dim},
        "ema_vq": {"n_embed": num_codes, "embedding_dim": module.embed_dim},
        "gumbel": {
            "num_hiddens": module.embed_dim,
            "embedding_dim": module.embed_dim,
            "n_embed": num_codes,
        },
    }
    quantizer = kind(**sizes[own["name"]], **options)
    # The nearest code is a matter of the encoding alone; the others draw or average in training.
    draws, averages = own["name"] == "gumbel", own["name"] == "ema_vq"

    def init(key: Array) -> tuple[PyTree, PyTree]:
        variables = quantizer.init(key, jnp.zeros((1, 1, 1, *codes)))
        params = {CODEBOOK: variables["params"]} if "params" in variables else {}
        return params, {k: v for k, v in variables.items() if k != "params"}

    def apply(
        params: PyTree,
        mutable: PyTree,
        moments: Array,
        keys: Keys,
        *,
        train: bool,
        step: Array | None = None,
    ) -> tuple[Array, Mapping[str, Array], PyTree]:
        own_params = params[CODEBOOK] if CODEBOOK in params else {}
        variables = {"params": own_params, **mutable}
        moments = moments.astype(jnp.float32)
        if draws:
            temperature = temperature_at(jnp.int32(0) if step is None else step)
            found: Any = quantizer.apply(
                variables, moments, keys if train else None, temperature=temperature, train=train
            )
            log = {} if step is None else {"scalars/temperature": temperature}
            return found.z, _log(found) | log, mutable
        if averages and train:
            found, mutable = quantizer.apply(variables, moments, train=True, mutable=["codebook"])
        else:
            found = quantizer.apply(variables, moments)
        return found.z, _log(found), mutable

    return Regularizer(init, apply)


def _temperature(section: dict[str, Any], path: str) -> Callable[[Array], Array]:
    """Take the schedule of a Gumbel quantizer's temperature out of a section: a row of the learning
    rate's schedules, whose value at a step is the temperature."""
    schedule = {"name": "constant"}
    if section["name"] == "gumbel" and "temperature" in section:
        schedule = section.pop("temperature")
    where = f"{path}.temperature"
    factory = row(LR_SCHEDULES, schedule, where)
    return factory(**bind(factory, schedule, where))


def _log(found: Quantized) -> dict[str, Array]:
    usage = found.cluster_usage.astype(jnp.float32)
    return {"loss/vq": found.loss, "perplexity": found.perplexity, "cluster_usage": usage}
