"""The `optimizer` and `lr_schedule` sections -> an optax chain and the rate at every step."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.experiment.config.binding import (
    ConfigError,
    Section,
    bind_section,
    parameters_of,
    value_of,
)
from diffusion_jax.experiment.config.options import EmaOptions, WarmupOptions
from diffusion_jax.train.lr_schedules import LR_SCHEDULES, with_warmup
from diffusion_jax.train.optimizer import (
    NOT_OPTIMIZERS,
    OPTIMIZERS,
    Optimizer,
    make_optimizer,
    scaled_learning_rate,
)
from diffusion_jax.train.power_ema import check_lengths
from diffusion_jax.types import PyTree

# Arguments of make_optimizer that the section `ema` decides.
_AVERAGES = ("power", "ema_start_step", "ema_update_every")
NO_AVERAGES = EmaOptions()
OPTIMIZER = Section(
    "config.optimizer",
    "The optimizer with its learning rate, clipping and the average of the parameters. What optax "
    f"has but does not work by itself is left out: {', '.join(sorted(NOT_OPTIMIZERS))}.",
    ((make_optimizer, ("name", "lr_multiplier", "trainable", *_AVERAGES)),),
    OPTIMIZERS,
    # make_optimizer passes the first four to a row itself; a config cannot hold the others, which
    # are functions, transformations and trees.
    (
        *("learning_rate", "max_learning_rate", "mask", "weight_decay_mask"),
        *("base_optimizer", "clip_value_fn", "hessian_diagonal_fn", "trust_ratio_mask"),
        *("muon_weight_dimension_numbers", "weight_dimension_numbers"),
    ),
    default="adamw",
)
LR_SCHEDULE = Section(
    "config.lr_schedule",
    "A multiplier of optimizer.learning_rate as a function of the step.",
    ((WarmupOptions, ()),),
    LR_SCHEDULES,
    default="constant",
    own=(),
)


EMA = Section(
    "config.ema",
    "When the average begins, and averages whose length is chosen after training.",
    ((EmaOptions, ()),),
)


def bind_ema(section: Mapping[str, Any] | None) -> EmaOptions:
    """Bind the `ema` section; ConfigError for lengths that do not fit together."""
    options = EmaOptions(**bind_section(EMA, section).own[0])
    try:
        if options.power:
            check_lengths(options.power)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error
    return options


def build_optimizer(
    optimizer: Mapping[str, Any] | None,
    lr_schedule: Mapping[str, Any] | None,
    batch_size: int,
    scale_lr: bool,
    path: str = OPTIMIZER.path,
    trainable: str | None = None,
    ema: EmaOptions = NO_AVERAGES,
) -> Optimizer:
    """Build the optimizer; the schedule is a multiplier of optimizer.learning_rate.

    scale_lr multiplies the learning rate by the global batch size, as latent-diffusion does.
    trainable: see Training. ema: when the average begins, and what is kept for others.
    Raises ValueError naming the option, its value and the choices.
    """
    _check_name(optimizer, path)
    bound = bind_section(OPTIMIZER._replace(path=path), optimizer)
    (chain,) = bound.own
    rate = value_of(make_optimizer, chain, "learning_rate")
    options = bound.keywords | chain
    options["learning_rate"] = scaled_learning_rate(rate, batch_size, scale_lr=scale_lr)
    options["lr_multiplier"] = _multiplier(lr_schedule)
    options |= {"power": ema.power, "ema_start_step": ema.start_step}
    options["ema_update_every"] = ema.update_every
    _check_late(ema, value_of(make_optimizer, chain, "ema_decay"), path)
    _check_pattern(trainable)
    make = functools.partial(make_optimizer, bound.name, **options)
    made = make()
    try:
        example = {"network": jnp.zeros((4, 4)), "conditioner": jnp.zeros((4, 4))}
        jax.eval_shape(functools.partial(_update, made.tx), example)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # optax's, of any kind
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{path}.name = {bound.name!r} makes no step with {bound.keywords}: {reason}"
        ) from error
    return made if trainable is None else make(trainable=trainable)


def _check_name(optimizer: Mapping[str, Any] | None, path: str) -> None:
    """Raise ConfigError for what optax has, but what cannot train by itself, and say why."""
    name = optimizer["name"] if optimizer is not None and "name" in optimizer else None
    if isinstance(name, str) and name in NOT_OPTIMIZERS:
        raise ConfigError(f"{path}.name = {name!r} cannot be used: {NOT_OPTIMIZERS[name]}")


def _check_late(ema: EmaOptions, decay: float | None, path: str) -> None:
    for name in ("start_step", "update_every"):
        value, plain = getattr(ema, name), getattr(NO_AVERAGES, name)
        if value != plain and decay is None:
            raise ConfigError(
                f"config.ema.{name} = {value} needs {path}.ema_decay, and it is None: there is no "
                "average that could begin later"
            )


def _check_pattern(trainable: str | None) -> None:
    try:
        re.compile(trainable or "")
    except re.error as error:
        raise ConfigError(
            f"config.train.trainable = {trainable!r} should be a regular expression: {error}"
        ) from error


def _update(tx: optax.GradientTransformationExtraArgs, params: PyTree) -> PyTree:
    """Update parameters once as train.step does; for its shapes and errors alone."""
    total = lambda params: sum(leaf.sum() for leaf in jax.tree.leaves(params))  # noqa: E731
    state = tx.init(params)
    return tx.update(params, state, params, value=total(params), obj_fn=total)


def _multiplier(section: Mapping[str, Any] | None) -> Any:
    bound = bind_section(LR_SCHEDULE, section)
    warmup = WarmupOptions(**bound.own[0])
    if bound.name == "constant" and not bound.keywords and not warmup.warmup_steps:
        return None  # some optimizers take no schedule at all
    if "warmup_steps" in parameters_of(bound.factory):
        return bound.make()
    return with_warmup(bound.make(), warmup.warmup_steps)
