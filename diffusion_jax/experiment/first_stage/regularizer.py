"""The `regularizer` section of a first stage: what stands between its encoder and its decoder."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.experiment.config.binding import Bound, ConfigError, Section, bind_section
from diffusion_jax.experiment.config.options import CodebookOptions, TemperatureOptions
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.quantizers import (
    EMAVectorQuantizer,
    GumbelQuantizer,
    Quantized,
    VectorQuantizer,
)
from diffusion_jax.models.first_stage.regularizers import gaussian_regularizer, identity_regularizer
from diffusion_jax.models.first_stage.video_decoder import VideoAutoencoder
from diffusion_jax.randomness import noise_like
from diffusion_jax.train.lr_schedules import LR_SCHEDULES
from diffusion_jax.types import Keys, PyTree


def gaussian(moments: Array, keys: Keys) -> tuple[Array, dict[str, Array]]:
    """Sample the latents of a Gaussian posterior and log its divergence from N(0, 1).

    The divergence has one value for each sample, so that the padding of a batch can be left out.
    """
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
REGULARIZER = Section(
    "config.regularizer",
    "What a first stage puts between its encoder and its decoder.",
    table=REGULARIZERS,
    given=("moments", "keys", "noise", "n_e", "e_dim", "n_embed", "embedding_dim", "num_hiddens"),
    extras={
        "vq": ((CodebookOptions, ()),),
        "ema_vq": ((CodebookOptions, ()),),
        "gumbel": ((CodebookOptions, ()), (TemperatureOptions, ())),
    },
    default="kl",
    own=("moments", "keys", "noise"),
)
TEMPERATURE = Section(
    "config.regularizer.temperature",
    "The temperature of the Gumbel quantizer as a function of the step.",
    table=LR_SCHEDULES,
    default="constant",
    own=(),
)


class Regularizer(NamedTuple):
    """What stands between encoder and decoder, as a pair of functions, and its name in a config.

    init: key -> (parameters or {}, mutable or {}). apply: (params of the autoencoder, mutable,
    moments, keys, *, train, step) -> (z, metrics, mutable); schedules read the number of the step.
    """

    name: str
    init: Callable[[Array], tuple[PyTree, PyTree]]
    apply: Callable[..., tuple[Array, Mapping[str, Array], PyTree]]


def build_regularizer(
    section: Mapping[str, Any] | None, module: Autoencoder | VideoAutoencoder
) -> Regularizer:
    """Build the regularizer of an autoencoder.

    One of the user's own is a function (moments, keys, **options) -> (z, log).
    Raises ConfigError for a wrong option, or one that does not fit what the encoder makes.
    """
    bound = bind_section(REGULARIZER, section)
    two = bound.name == "kl"
    if bound.name in REGULARIZERS and two != module.double_z:
        raise ConfigError(
            f"config.model.double_z = {module.double_z} should be {two}: config.regularizer.name = "
            f"{bound.name!r} reads {'mean and variance' if two else 'one value'} for each latent"
        )
    if bound.name in QUANTIZERS:
        return _quantizer(bound, module.embed_dim)
    plain = _plain(functools.partial(bound.factory, **bound.keywords))
    return Regularizer(bound.name, lambda key: ({}, {}), plain)


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


def _quantizer(bound: Bound, width: int) -> Regularizer:
    own, *more = bound.extra
    num_codes = CodebookOptions(**own).num_codes
    asked = TemperatureOptions(**more[0]).temperature if more else None
    schedule = bind_section(TEMPERATURE, asked).make()
    sizes = {
        "vq": {"n_e": num_codes, "e_dim": width},
        "ema_vq": {"n_embed": num_codes, "embedding_dim": width},
        "gumbel": {"num_hiddens": width, "embedding_dim": width, "n_embed": num_codes},
    }
    quantizer = bound.make(**sizes[bound.name])
    # The nearest code is a matter of the encoding alone; the others draw or average in training.
    draws, averages = bound.name == "gumbel", bound.name == "ema_vq"

    def init(key: Array) -> tuple[PyTree, PyTree]:
        variables = quantizer.init(key, jnp.zeros((1, 1, 1, width)))
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
            temperature = schedule(jnp.int32(0) if step is None else step)
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

    return Regularizer(bound.name, init, apply)


def _log(found: Quantized) -> dict[str, Array]:
    usage = found.cluster_usage.astype(jnp.float32)
    return {"loss/vq": found.loss, "perplexity": found.perplexity, "cluster_usage": usage}
