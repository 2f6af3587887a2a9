"""The `loss`, `sigma_sampling` and `weighting` sections -> what training minimises."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.data.images import ImageOptions
from diffusion_jax.diffusion.losses import ddpm_loss
from diffusion_jax.diffusion.samplers.sigmas import DISCRETIZATIONS
from diffusion_jax.diffusion.sigma_sampling import SIGMA_SAMPLINGS, SigmaOf, discrete
from diffusion_jax.diffusion.weighting import WEIGHTINGS, Weighting
from diffusion_jax.experiment.config.binding import (
    Bound,
    ConfigError,
    Section,
    bind_section,
    parameters_of,
    value_of,
)
from diffusion_jax.experiment.config.options import LevelsOptions, LogvarOptions
from diffusion_jax.experiment.data import check_alike
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.experiment.noise import Noise, bind_levels
from diffusion_jax.models.conditioning.conditioner import can_guide
from diffusion_jax.train.diffusion.consistency_loss import consistency_loss_fn
from diffusion_jax.train.diffusion.denoiser_loss import denoiser_loss_fn
from diffusion_jax.train.diffusion.mean_flow_loss import mean_flow_loss_fn
from diffusion_jax.train.diffusion.noising import PLAIN, NoiseOptions
from diffusion_jax.train.diffusion.timestep_loss import diffusion_loss
from diffusion_jax.train.step import LossFn

# What diffusion_loss hands to ddpm_loss, the first six by position; all else are options.
DDPM_INPUTS = (
    "schedule model_output x_start x_t t noise logvar weight cells parameterization"
).split()
# What a maker of a LossFn may ask for by naming it in its signature; apply, embed and encode come
# first and always.
NETWORK_INPUTS = ("apply", "embed", "encode")
NOISE_INPUTS = (
    "parameterization scaling sigma_of weighting batch_size quantize_c_noise around"
).split()
LOSS = Section(
    "config.loss",
    "What training minimises.",
    table={
        "ddpm": ddpm_loss,
        "denoiser": denoiser_loss_fn,
        "mean_flow": mean_flow_loss_fn,
        "consistency": consistency_loss_fn,
    },
    given=(*DDPM_INPUTS, *NETWORK_INPUTS, *NOISE_INPUTS, "noising"),
    extras={"ddpm": ((LogvarOptions, ()), (NoiseOptions, ())), "denoiser": ((NoiseOptions, ()),)},
    default="ddpm",
    own=(*DDPM_INPUTS, *NETWORK_INPUTS, *NOISE_INPUTS),
)
SIGMA_SAMPLING = Section(
    "config.sigma_sampling",
    "How the denoiser's loss draws noise levels; by default from its table, or log-normal.",
    table=SIGMA_SAMPLINGS,
    given=("discretization",),
    extras={"discrete": ((LevelsOptions, ()),)},
    own=(),
)
LEVELS = Section(
    "config.sigma_sampling.discretization",
    "The table that training draws from; by default the denoiser's.",
    table=DISCRETIZATIONS,
    given=("num_steps",),
    own=("num_steps",),
)
WEIGHTING = Section(
    "config.weighting",
    "The weight w(sigma) of the denoiser's loss; by default 1 on what the network predicts.",
    table=WEIGHTINGS,
    own=(),
)


class Objective(NamedTuple):
    """A loss function, what it reads beyond the noise levels, and what it learns itself."""

    loss_fn: LossFn
    constants: dict[str, Array]
    learned: dict[str, Array]


def build_objective(
    network: Network, noise: Noise, sections: Mapping[str, Any], batch_size: int
) -> Objective:
    """Build the objective of a config; batch_size counts the global batch.

    A loss of the user's own that names `apply` is a maker of a LossFn, as denoiser_loss_fn is; any
    other is the loss of a batch at its timesteps, as ddpm_loss is. Both are given what they name.
    Raises ConfigError for a wrong option, and for a section that the loss does not read.
    """
    bound = bind_section(LOSS, sections["loss"])
    inputs: dict[str, Callable[[], Any]] = {
        "parameterization": lambda: noise.parameterization,
        "scaling": lambda: noise.scaling,
        "sigma_of": lambda: _sigma_sampling(sections["sigma_sampling"], noise),
        "weighting": lambda: _weighting(sections["weighting"], noise),
        "batch_size": lambda: batch_size,
        "quantize_c_noise": lambda: noise.quantize_c_noise,
        "around": lambda: noise.around,
    }
    asked = parameters_of(bound.factory)
    for name, reader in (("sigma_sampling", "sigma_of"), ("weighting", "weighting")):
        if sections[name] is not None and reader not in asked:
            raise ConfigError(
                f"config.{name} is read with config.loss.name = 'denoiser' only, and it is "
                f"{bound.name!r}"
            )
    check_around(noise, network)
    if noise.around is not None and "around" not in asked:
        raise ConfigError(
            f"config.denoiser.around = {noise.around!r} needs config.loss.name = 'denoiser', and "
            f"it is {bound.name!r}"
        )
    if "apply" not in asked:
        return _timestep_loss(network, noise, bound)
    if bound.factory is mean_flow_loss_fn:
        _check_mean_flow(network, noise, bound)
    if bound.factory is consistency_loss_fn:
        _check_consistency(noise, bound)
    given = {name: make() for name, make in inputs.items() if name in asked}
    if bound.factory is denoiser_loss_fn:
        given["noising"] = NoiseOptions(**bound.extra[0])
    return Objective(bound.make(network.apply, network.embed, network.encode, **given), {}, {})


def check_around(noise: Noise, network: Network) -> None:
    """Raise ConfigError unless what is denoised around is like the images or frames of a model."""
    if noise.around is None:
        return
    shapes = conditioning_shapes(network.embedders, network.image_shape)
    found = shapes[noise.around].shape[-1] if noise.around in shapes else "no"
    if found != network.image_shape[-1]:
        raise ConfigError(
            f"config.denoiser.around = {noise.around!r} needs an embedder that gives the network "
            f"{network.image_shape[-1]} channels beside its input, and there are {found}"
        )


def check_emphasis(section: Mapping[str, Any] | None, images: ImageOptions) -> None:
    """Raise ConfigError for samples or pixels that count more than others, and a loss without them.

    section: config.loss.
    """
    bound = bind_section(LOSS, section)
    if bound.factory in (mean_flow_loss_fn, consistency_loss_fn):
        check_alike(images, f"config.loss.name = {bound.name!r}")


def _check_consistency(noise: Noise, bound: Bound) -> None:
    """Check that D(x, sigma_min) = x, without which every constant would be consistent."""
    lowest = jnp.full((1,), value_of(consistency_loss_fn, bound.keywords, "sigma_min"))
    c = noise.scaling(lowest)
    if noise.sigmas is not None or (float(c.c_skip[0]), float(c.c_out[0])) != (1.0, 0.0):
        raise ConfigError(
            "config.loss.name = 'consistency' needs config.denoiser.name = 'continuous' and "
            "config.denoiser.scaling.name = 'consistency' with the same sigma_min as config.loss"
        )


def _check_mean_flow(network: Network, noise: Noise, bound: Bound) -> None:
    if not getattr(network.module, "embeds_duration", False):
        raise ConfigError(
            "config.model.embeds_duration should be True for config.loss.name = 'mean_flow', "
            "whose network reads two times"
        )
    if noise.sigmas is not None or noise.natural_weighting != {"name": "flow"}:
        raise ConfigError(
            "config.loss.name = 'mean_flow' needs config.denoiser.name = 'continuous' and "
            "config.denoiser.scaling.name = 'flow'"
        )
    scale = value_of(mean_flow_loss_fn, bound.keywords, "guidance_scale")
    if scale != 1.0 and not can_guide(network.embedders):
        raise ConfigError(
            f"config.loss.guidance_scale = {scale} needs an embedder with ucg_rate > 0: the "
            "network learns what it is guided away from where conditions are dropped"
        )


def _timestep_loss(network: Network, noise: Noise, bound: Bound) -> Objective:
    if not noise.on_timesteps:
        raise ConfigError(
            f"config.loss.name = {bound.name!r} trains on the schedule's timesteps and "
            "parameterization: drop config.denoiser, or use config.loss.name = 'denoiser'"
        )
    is_ddpm = bound.factory is ddpm_loss
    loss_fn = diffusion_loss(
        network.apply,
        network.embed,
        network.encode,
        loss=ddpm_loss if is_ddpm else _own_loss(bound.factory),
        parameterization=noise.parameterization,
        noising=NoiseOptions(**bound.extra[1]) if is_ddpm else PLAIN,
        **bound.keywords,
    )
    own = LogvarOptions(**bound.extra[0]) if is_ddpm else LogvarOptions()
    logvar = jnp.full((noise.schedule.num_timesteps,), own.logvar_init, jnp.float32)
    learns = is_ddpm and value_of(ddpm_loss, bound.keywords, "learn_logvar")
    return Objective(loss_fn, {"logvar": logvar}, {"logvar": logvar} if learns else {})


def _own_loss(function: Callable) -> Callable:
    """Give a user's loss what it names, and its value the name "loss" among the metrics."""
    names = parameters_of(function)

    def loss(*arrays: Any, **keywords: Any) -> tuple[Array, dict[str, Array]]:
        given = dict(zip(DDPM_INPUTS, arrays, strict=False)) | keywords
        if given["cells"] is not None and "cells" not in names:
            raise ValueError(
                "config.data.batches.loss_mask and weight_key need a loss that takes cells, and "
                f"{function.__name__} does not"
            )
        value, metrics = function(**{name: given[name] for name in given if name in names})
        return value, {"loss": value, **metrics}

    return loss


def _sigma_sampling(section: Mapping[str, Any] | None, noise: Noise) -> SigmaOf:
    default = {"name": noise.natural_sampling}
    bound = bind_section(SIGMA_SAMPLING, default if section is None else section)
    if bound.factory is not discrete:
        return bound.make()
    own = LevelsOptions(**bound.extra[0]).discretization
    if own is not None:
        return bound.make(bind_levels(LEVELS, own))
    if noise.levels is None or noise.sigmas is None:
        raise ConfigError(f"{LEVELS.path} is missing: a continuous denoiser has no table of levels")
    return discrete(noise.levels, **{"num_idx": len(noise.sigmas)} | bound.keywords)


def _weighting(section: Mapping[str, Any] | None, noise: Noise) -> Weighting:
    section = noise.natural_weighting if section is None else section
    if section is None:
        raise ConfigError(
            f"{WEIGHTING.path} is missing: no weighting follows from config.denoiser.scaling; "
            f"choose from {', '.join(sorted(WEIGHTINGS))}"
        )
    return bind_section(WEIGHTING, section).make()
