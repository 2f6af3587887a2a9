"""Learning-rate schedules: functions step -> multiplier of the learning rate.

`LR_SCHEDULES` names the factories. Those of latent-diffusion keep its names of arguments; those of
optax keep optax's. Every schedule takes a Python integer or a traced int32 scalar and returns a
float32 scalar; the first update sees step 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule: TypeAlias = Callable[[Any], jax.Array]
Number: TypeAlias = float | int


def constant(value: Number = 1.0) -> Schedule:
    """The same multiplier at every step."""
    return lambda step: jnp.float32(value)


def linear(
    transition_steps: int,
    init_value: Number = 1.0,
    end_value: Number = 0.0,
    transition_begin: int = 0,
) -> Schedule:
    """A straight line from `init_value` to `end_value`."""
    _check_positive("linear", transition_steps=transition_steps)
    return _optax(optax.linear_schedule(init_value, end_value, transition_steps, transition_begin))


def polynomial(
    transition_steps: int,
    power: Number,
    init_value: Number = 1.0,
    end_value: Number = 0.0,
    transition_begin: int = 0,
) -> Schedule:
    """end + (init - end) (1 - step / transition_steps)^power."""
    _check_positive("polynomial", transition_steps=transition_steps)
    return _optax(
        optax.polynomial_schedule(init_value, end_value, power, transition_steps, transition_begin)
    )


def cosine_decay(decay_steps: int, alpha: Number = 0.0, exponent: Number = 1.0) -> Schedule:
    """Half a cosine from 1 to `alpha` (SGDR, arXiv:1608.03983, without restarts)."""
    _check_positive("cosine_decay", decay_steps=decay_steps)
    return _optax(optax.cosine_decay_schedule(1.0, decay_steps, alpha, exponent))


def exponential_decay(
    transition_steps: int,
    decay_rate: Number,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    """decay_rate^(step / transition_steps)."""
    _check_positive("exponential_decay", transition_steps=transition_steps, decay_rate=decay_rate)
    return _optax(
        optax.exponential_decay(
            1.0, transition_steps, decay_rate, transition_begin, staircase, end_value
        )
    )


def warmup_constant(warmup_steps: int, init_value: Number = 0.0) -> Schedule:
    """A straight line from `init_value` to 1, then 1."""
    _check_positive("warmup_constant", warmup_steps=warmup_steps)
    return _optax(optax.warmup_constant_schedule(init_value, 1.0, warmup_steps))


def warmup_cosine_decay(
    warmup_steps: int,
    decay_steps: int,
    init_value: Number = 0.0,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> Schedule:
    """A straight line to 1, then half a cosine to `end_value`; `decay_steps` counts both."""
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"warmup_cosine_decay.decay_steps={decay_steps} must exceed warmup_steps={warmup_steps}"
        )
    return _optax(
        optax.warmup_cosine_decay_schedule(
            init_value, 1.0, warmup_steps, decay_steps, end_value, exponent
        )
    )


def warmup_exponential_decay(
    warmup_steps: int,
    transition_steps: int,
    decay_rate: Number,
    init_value: Number = 0.0,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    """A straight line to 1, then decay_rate^(step / transition_steps)."""
    _check_positive(
        "warmup_exponential_decay", transition_steps=transition_steps, decay_rate=decay_rate
    )
    return _optax(
        optax.warmup_exponential_decay_schedule(
            init_value,
            1.0,
            warmup_steps,
            transition_steps,
            decay_rate,
            transition_begin,
            staircase,
            end_value,
        )
    )


def piecewise_constant(boundaries: Sequence[int], scales: Sequence[Number]) -> Schedule:
    """1, multiplied by scales[i] from step boundaries[i] on."""
    _check_same_length("piecewise_constant", boundaries=boundaries, scales=scales)
    return _optax(
        optax.piecewise_constant_schedule(1.0, dict(zip(boundaries, scales, strict=True)))
    )


def piecewise_interpolate(
    boundaries: Sequence[int], scales: Sequence[Number], interpolate_type: str = "linear"
) -> Schedule:
    """1, scaled by scales[i] until boundaries[i]; "linear" or "cosine" between them."""
    _check_same_length("piecewise_interpolate", boundaries=boundaries, scales=scales)
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(
            f"piecewise_interpolate.interpolate_type={interpolate_type!r}; choose linear or cosine"
        )
    pairs = dict(zip(boundaries, scales, strict=True))
    return _optax(optax.piecewise_interpolate_schedule(interpolate_type, 1.0, pairs))


def linear_onecycle(
    transition_steps: int,
    pct_start: Number = 0.3,
    pct_final: Number = 0.85,
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
) -> Schedule:
    """Super-convergence in straight lines (arXiv:1708.07120): up to 1, down, and far down."""
    _check_positive("linear_onecycle", transition_steps=transition_steps)
    return _optax(
        optax.linear_onecycle_schedule(
            transition_steps, 1.0, pct_start, pct_final, div_factor, final_div_factor
        )
    )


def cosine_onecycle(
    transition_steps: int,
    pct_start: Number = 0.3,
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
) -> Schedule:
    """Super-convergence in cosines (arXiv:1708.07120): up to 1, and far down."""
    _check_positive("cosine_onecycle", transition_steps=transition_steps)
    return _optax(
        optax.cosine_onecycle_schedule(
            transition_steps, 1.0, pct_start, div_factor, final_div_factor
        )
    )


def inverse_sqrt(reference_steps: Number) -> Schedule:
    """1 / sqrt(max(step / reference_steps, 1)) (EDM2, arXiv:2312.02696).

    Constant for `reference_steps` steps, then falling with the root of the step.
    """
    _check_positive("inverse_sqrt", reference_steps=reference_steps)
    return lambda step: jax.lax.rsqrt(jnp.maximum(_float(step) / reference_steps, 1.0))


def lambda_warmup_cosine(
    warm_up_steps: Number, lr_min: Number, lr_max: Number, lr_start: Number, max_decay_steps: Number
) -> Schedule:
    """LambdaWarmUpCosineScheduler: a line from start to max, then half a cosine to min, held.

    Warm-up: (max - start) / warm * n + start. After it: min + (max - min) (1 + cos(pi t)) / 2 with
    t = min((n - warm) / (decay - warm), 1). Source: latent-diffusion, lr_scheduler.py.
    """
    cycles = ((warm_up_steps,), (lr_min,), (lr_max,), (lr_start,), (max_decay_steps,))
    return _cycles("lambda_warmup_cosine", _cosine, *cycles)


def lambda_warmup_cosine2(
    warm_up_steps: Sequence[Number],
    f_min: Sequence[Number],
    f_max: Sequence[Number],
    f_start: Sequence[Number],
    cycle_lengths: Sequence[Number],
) -> Schedule:
    """LambdaWarmUpCosineScheduler2: `lambda_warmup_cosine` in cycles, one entry per cycle.

    Steps count from the start of their cycle; the last step of a cycle belongs to it. Past the last
    cycle its last value holds (upstream raises a TypeError). Source: latent-diffusion.
    """
    cycles = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
    return _cycles("lambda_warmup_cosine2", _cosine, *cycles)


def lambda_linear(
    warm_up_steps: Sequence[Number],
    f_min: Sequence[Number],
    f_max: Sequence[Number],
    f_start: Sequence[Number],
    cycle_lengths: Sequence[Number],
) -> Schedule:
    """LambdaLinearScheduler: cycles of a warm-up and f_min + (f_max - f_min) (length - n) / length.

    n counts from the start of the cycle, not from the end of the warm-up, so the multiplier jumps
    down by (f_max - f_min) warm / length where the warm-up ends, as in the released trainings.
    Past the last cycle its last value holds. Source: latent-diffusion.
    """
    cycles = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
    return _cycles("lambda_linear", _line, *cycles)


LR_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "polynomial": polynomial,
    "cosine_decay": cosine_decay,
    "exponential_decay": exponential_decay,
    "warmup_constant": warmup_constant,
    "warmup_cosine_decay": warmup_cosine_decay,
    "warmup_exponential_decay": warmup_exponential_decay,
    "piecewise_constant": piecewise_constant,
    "piecewise_interpolate": piecewise_interpolate,
    "linear_onecycle": linear_onecycle,
    "cosine_onecycle": cosine_onecycle,
    "inverse_sqrt": inverse_sqrt,
    "lambda_warmup_cosine": lambda_warmup_cosine,
    "lambda_warmup_cosine2": lambda_warmup_cosine2,
    "lambda_linear": lambda_linear,
}


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """`schedule` times min((step + 1) / warmup_steps, 1): the first update already moves.

    `warmup_steps` = 0 returns the schedule as it is. The schedule's own steps are not shifted.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must not be negative")
    if warmup_steps == 0:
        return schedule
    return lambda step: jnp.minimum((_float(step) + 1.0) / warmup_steps, 1.0) * schedule(step)


def _cycles(
    name: str,
    after: Callable[..., jax.Array],
    warm_up_steps: Sequence[Number],
    f_min: Sequence[Number],
    f_max: Sequence[Number],
    f_start: Sequence[Number],
    cycle_lengths: Sequence[Number],
) -> Schedule:
    """Cycles of a linear warm-up from f_start to f_max and `after`(n, warm, length, min, max)."""
    _check_same_length(
        name,
        warm_up_steps=warm_up_steps,
        f_min=f_min,
        f_max=f_max,
        f_start=f_start,
        cycle_lengths=cycle_lengths,
    )
    _check_positive(name, **{f"cycle_lengths[{i}]": v for i, v in enumerate(cycle_lengths)})
    rows = np.asarray([warm_up_steps, f_min, f_max, f_start, cycle_lengths], np.float64)
    ends = np.cumsum(rows[4])
    # columns: start of the cycle, warm-up, min, max, start value, length
    table = np.concatenate([(ends - rows[4])[None], rows]).astype(np.float32)
    ends = ends.astype(np.float32)

    def schedule(step: Any) -> jax.Array:
        n = jnp.minimum(_float(step), ends[-1])
        begin, warm, low, high, start, length = jnp.asarray(table)[:, jnp.sum(n > ends)]
        n = n - begin
        rising = (high - start) / jnp.maximum(warm, 1.0) * n + start
        return jnp.where(n < warm, rising, after(n, warm, length, low, high))

    return schedule


def _cosine(
    n: jax.Array, warm: jax.Array, length: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    t = jnp.clip((n - warm) / jnp.maximum(length - warm, 1.0), 0.0, 1.0)
    return low + 0.5 * (high - low) * (1.0 + jnp.cos(math.pi * t))


def _line(
    n: jax.Array, warm: jax.Array, length: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    del warm
    return low + (high - low) * (length - n) / length


def _optax(schedule: Callable[[Any], Any]) -> Schedule:
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def _float(step: Any) -> jax.Array:
    return jnp.asarray(step, jnp.float32)


def _check_positive(name: str, **values: Number) -> None:
    for argument, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}.{argument}={value} must be positive")


def _check_same_length(name: str, **lists: Sequence[Number]) -> None:
    lengths = {argument: len(values) for argument, values in lists.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"{name} needs lists of one length, at least 1, got {lengths}")
