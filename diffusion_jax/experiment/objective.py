"""The `loss`, `sigma_sampling` and `weighting` sections -> what training minimises."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.losses import ddpm_loss
from diffusion_jax.diffusion.sigma_sampling import SIGMA_SAMPLINGS, SigmaOf, discrete
from diffusion_jax.diffusion.weighting import WEIGHTINGS, Weighting
from diffusion_jax.experiment.binding import ConfigError, bind, check_type, row, value_of
from diffusion_jax.experiment.network import Network
from diffusion_jax.experiment.noise import Noise, bind_levels
from diffusion_jax.train.diffusion.denoiser_loss import denoiser_loss_fn
from diffusion_jax.train.diffusion.timestep_loss import diffusion_loss
from diffusion_jax.train.step import LossFn

LOSSES = {"ddpm": ddpm_loss, "denoiser": denoiser_loss_fn}
# What diffusion_loss hands to a loss; everything else of its signature is an option.
DDPM_INPUTS = (
    "schedule",
    "model_output",
    "x_start",
    "x_t",
    "t",
    "noise",
    "logvar",
    "weight",
    "parameterization",
)
DENOISER_INPUTS = (
    "apply",
    "embed",
    "encode",
    "scaling",
    "sigma_of",
    "weighting",
    "batch_size",
    "quantize_c_noise",
)


class Objective(NamedTuple):
    """A loss function, what it reads beyond the noise levels, and what it learns itself."""

    loss_fn: LossFn
    constants: dict[str, Array]
    learned: dict[str, Array]


def build_objective(
    network: Network, noise: Noise, sections: Mapping[str, Any], batch_size: int
) -> Objective:
    """Build the objective of a config; batch_size is that of the global batch.

    Raises ConfigError for a wrong option, and for a section that the loss does not read.
    """
    section = sections["loss"]
    if row(LOSSES, section, "config.loss") is denoiser_loss_fn:
        return Objective(_denoiser_loss(network, noise, sections, batch_size), {}, {})
    for name in ("sigma_sampling", "weighting"):
        if name in sections:
            raise ConfigError(
                f"config.{name} is read with config.loss.name = 'denoiser' only, and it is "
                f"{section['name']!r}"
            )
    return _ddpm_loss(network, noise, section)


def _ddpm_loss(network: Network, noise: Noise, section: Mapping[str, Any]) -> Objective:
    if not noise.on_timesteps:
        raise ConfigError(
            "config.loss.name = 'ddpm' trains on the schedule's timesteps and parameterization: "
            "drop config.denoiser, or use config.loss.name = 'denoiser'"
        )
    section = {"logvar_init": 0.0} | dict(section)
    logvar_init = check_type(section.pop("logvar_init"), float, "config.loss.logvar_init")
    options = bind(ddpm_loss, section, "config.loss", given=DDPM_INPUTS)
    loss_fn = diffusion_loss(
        network.apply,
        network.embed,
        network.encode,
        parameterization=noise.parameterization,
        **options,
    )
    logvar = jnp.full((noise.schedule.num_timesteps,), logvar_init, jnp.float32)
    learned = {"logvar": logvar} if value_of(ddpm_loss, options, "learn_logvar") else {}
    return Objective(loss_fn, {"logvar": logvar}, learned)


def _denoiser_loss(
    network: Network, noise: Noise, sections: Mapping[str, Any], batch_size: int
) -> LossFn:
    options = bind(denoiser_loss_fn, sections["loss"], "config.loss", given=DENOISER_INPUTS)
    default_sampling = {"name": "lognormal" if noise.levels is None else "discrete"}
    sampling = sections["sigma_sampling"] if "sigma_sampling" in sections else default_sampling
    weighting = sections["weighting"] if "weighting" in sections else noise.natural_weighting
    return denoiser_loss_fn(
        network.apply,
        network.embed,
        network.encode,
        scaling=noise.scaling,
        sigma_of=_sigma_sampling(sampling, noise),
        weighting=_weighting(weighting),
        batch_size=batch_size,
        quantize_c_noise=noise.quantize_c_noise,
        **options,
    )


def _sigma_sampling(section: Mapping[str, Any], noise: Noise) -> SigmaOf:
    path = "config.sigma_sampling"
    factory = row(SIGMA_SAMPLINGS, section, path)
    if factory is not discrete:
        return factory(**bind(factory, section, path))
    section = dict(section)
    if "discretization" in section:
        levels = bind_levels(section.pop("discretization"), f"{path}.discretization")
    elif noise.levels is not None and noise.sigmas is not None:
        levels, section = noise.levels, {"num_idx": len(noise.sigmas)} | section
    else:
        raise ConfigError(
            f"{path}.discretization is missing: a continuous denoiser has no table of levels"
        )
    return discrete(levels, **bind(discrete, section, path, given=("discretization",)))


def _weighting(section: Mapping[str, Any]) -> Weighting:
    factory = row(WEIGHTINGS, section, "config.weighting")
    return factory(**bind(factory, section, "config.weighting"))
