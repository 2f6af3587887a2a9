"""The `optimizer` and `lr_schedule` sections -> an optax chain and the learning rate as a function
of the step."""

from collections.abc import Mapping
from typing import Any

from diffusion_jax.build.binding import bind, check_type, options, pick
from diffusion_jax.train.lr_schedules import LR_SCHEDULES, with_warmup
from diffusion_jax.train.optimizer import Optimizer, make_optimizer, scaled_learning_rate


def build_optimizer(
    optimizer: Mapping[str, Any],
    lr_schedule: Mapping[str, Any],
    *,
    batch_size: int,
    scale_lr: bool,
) -> Optimizer:
    """Build the optimizer; the schedule is a multiplier of optimizer.learning_rate.

    scale_lr multiplies the learning rate by the global batch size, as latent-diffusion does.
    Raises ConfigError or ValueError naming the option, its value and the choices.
    """
    keywords = options(optimizer)
    if "learning_rate" in keywords:
        keywords["learning_rate"] = scaled_learning_rate(
            keywords["learning_rate"], batch_size, scale_lr=scale_lr
        )
    name = {"name": optimizer["name"]} if "name" in optimizer else {}
    multiplier = _multiplier(dict(lr_schedule)) if lr_schedule else None
    return make_optimizer(**name, **keywords, lr_multiplier=multiplier)


def _multiplier(section: dict[str, Any]) -> Any:
    path = "config.lr_schedule"
    warmup_steps = check_type(section.pop("warmup_steps", 0), int, f"{path}.warmup_steps")
    name = section["name"] if "name" in section else "constant"
    factory = pick(LR_SCHEDULES, name, f"{path}.name")
    schedule = factory(**bind(factory, section, path))
    return with_warmup(schedule, warmup_steps)
