"""The `optimizer` and `lr_schedule` sections -> an optax chain and the learning rate as a function
of the step."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusion_jax.experiment.binding import bind, check_type, row, value_of
from diffusion_jax.train.lr_schedules import LR_SCHEDULES, with_warmup
from diffusion_jax.train.optimizer import (
    OPTIMIZERS,
    Optimizer,
    make_optimizer,
    scaled_learning_rate,
)

# make_optimizer passes these to a factory itself.
GIVEN = ("learning_rate", "max_learning_rate", "mask", "weight_decay_mask")


def build_optimizer(
    optimizer: Mapping[str, Any], lr_schedule: Mapping[str, Any], batch_size: int, scale_lr: bool
) -> Optimizer:
    """Build the optimizer; the schedule is a multiplier of optimizer.learning_rate.

    scale_lr multiplies the learning rate by the global batch size, as latent-diffusion does.
    Raises ValueError naming the option, its value and the choices.
    """
    path = "config.optimizer"
    factory = row(OPTIMIZERS, optimizer, path)
    own = inspect.signature(make_optimizer).parameters
    keywords = bind(make_optimizer, optimizer, path, given=("name", "lr_multiplier"))
    bind(factory, {k: v for k, v in keywords.items() if k not in own}, path, given=GIVEN)
    rate = value_of(make_optimizer, keywords, "learning_rate")
    keywords["learning_rate"] = scaled_learning_rate(rate, batch_size, scale_lr=scale_lr)
    multiplier = _multiplier(dict(lr_schedule))
    return make_optimizer(optimizer["name"], **keywords, lr_multiplier=multiplier)


def _multiplier(section: dict[str, Any]) -> Any:
    path = "config.lr_schedule"
    if section == {"name": "constant"}:
        return None  # some optimizers take no schedule at all
    factory = row(LR_SCHEDULES, section, path)
    section = {"warmup_steps": 0} | section
    if "warmup_steps" in inspect.signature(factory).parameters:
        return factory(**bind(factory, section, path))
    warmup_steps = check_type(section.pop("warmup_steps"), int, f"{path}.warmup_steps")
    return with_warmup(factory(**bind(factory, section, path)), warmup_steps)
