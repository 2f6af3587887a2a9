"""Learning-rate schedules: functions from a step to a multiplier of the learning rate.

`LR_SCHEDULES` names the functions that make them. Their keywords are optax's, or latent-diffusion's
for its own schedules. A schedule takes a Python integer or a traced int32 scalar and returns a
float32 scalar; the first update sees step 0.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule: TypeAlias = Callable[[Any], jax.Array]
Number: TypeAlias = float | int


def constant(value: Number = 1.0) -> Schedule:
    """Return the same multiplier at every step."""
    return lambda step: jnp.float32(value)


def piecewise_constant(boundaries: Sequence[int], scales: Sequence[Number]) -> Schedule:
    """Start at 1 and multiply by scales[i] from step boundaries[i] on."""
    pairs = _pairs("piecewise_constant", boundaries, scales)
    return _float32(optax.piecewise_constant_schedule(1.0, pairs))


def piecewise_interpolate(
    boundaries: Sequence[int], scales: Sequence[Number], interpolate_type: str = "linear"
) -> Schedule:
    """Start at 1, scaled by scales[i] until boundaries[i]; "linear" or "cosine" between them."""
    pairs = _pairs("piecewise_interpolate", boundaries, scales)
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(
            f"piecewise_interpolate.interpolate_type = {interpolate_type!r} is unknown; "
            "choose from linear, cosine"
        )
    return _float32(optax.piecewise_interpolate_schedule(interpolate_type, 1.0, pairs))


def inverse_sqrt(reference_steps: Number) -> Schedule:
    """Compute 1 / sqrt(max(step / reference_steps, 1)) (EDM2, arXiv:2312.02696).

    Constant for `reference_steps` steps, then falling with the root of the step.
    """
    _check_above("inverse_sqrt.reference_steps", reference_steps)
    return lambda step: jax.lax.rsqrt(jnp.maximum(_float(step) / reference_steps, 1.0))


def lambda_warmup_cosine(
    warm_up_steps: Number, lr_min: Number, lr_max: Number, lr_start: Number, max_decay_steps: Number
) -> Schedule:
    """Rise in a line from lr_start to lr_max, then fall along half a cosine to lr_min, and stay.

    Warm-up: (max - start) / warm * n + start. After it: min + (max - min) (1 + cos(pi t)) / 2 with
    t = min((n - warm) / (decay - warm), 1).
    Source: latent-diffusion, LambdaWarmUpCosineScheduler.
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
    """Repeat `lambda_warmup_cosine` in cycles, with one entry of every list for each cycle.

    Steps count from the start of their cycle; the last step of a cycle belongs to it. Past the last
    cycle its last value holds (upstream raises a TypeError).
    Source: latent-diffusion, LambdaWarmUpCosineScheduler2.
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
    """Repeat a warm-up and then f_min + (f_max - f_min) (length - n) / length, in cycles.

    n counts from the start of the cycle, not from the end of the warm-up, so the multiplier jumps
    down by (f_max - f_min) warm / length where the warm-up ends, as in the released trainings.
    Past the last cycle its last value holds.
    Source: latent-diffusion, LambdaLinearScheduler.
    """
    cycles = (warm_up_steps, f_min, f_max, f_start, cycle_lengths)
    return _cycles("lambda_linear", _line, *cycles)


class _Optax(NamedTuple):
    """A schedule of optax, to be a multiplier whose highest value is 1.

    one: its keyword for the highest value. above: keywords with what they must be above, a number
    or another keyword. defaults: for keywords that have none in optax.
    """

    factory: Callable[..., Callable[[Any], Any]]
    one: str | None
    above: Mapping[str, int | str]
    defaults: Mapping[str, Number] = {}


_STEPS = {"transition_steps": 0}
_DECAY = {"transition_steps": 0, "decay_rate": 0}
_UP = {"init_value": 0.0}
_DOWN = {"init_value": 1.0, "end_value": 0.0}
_WARMUP = {"decay_steps": "warmup_steps"}
_OPTAX = {
    "linear": _Optax(optax.linear_schedule, None, _STEPS, _DOWN),
    "polynomial": _Optax(optax.polynomial_schedule, None, _STEPS, _DOWN),
    "cosine_decay": _Optax(optax.cosine_decay_schedule, "init_value", {"decay_steps": 0}),
    "exponential_decay": _Optax(optax.exponential_decay, "init_value", _DECAY),
    "warmup_constant": _Optax(optax.warmup_constant_schedule, "peak_value", {}, _UP),
    # decay_steps counts the warm-up too
    "warmup_cosine_decay": _Optax(optax.warmup_cosine_decay_schedule, "peak_value", _WARMUP, _UP),
    "warmup_exponential_decay": _Optax(
        optax.warmup_exponential_decay_schedule, "peak_value", _DECAY, _UP
    ),
    "linear_onecycle": _Optax(optax.linear_onecycle_schedule, "peak_value", _STEPS),
    "cosine_onecycle": _Optax(optax.cosine_onecycle_schedule, "peak_value", _STEPS),
}


def _of_optax(name: str, row: _Optax) -> Callable[..., Schedule]:
    """Make the function of a row; its signature has optax's keywords, with types and defaults."""
    assert row.factory.__doc__ is not None
    given = inspect.signature(row.factory, eval_str=True).parameters
    parameters = [_parameter(p, row.defaults) for p in given.values() if p.name != row.one]
    parameters.sort(key=lambda p: p.default is not p.empty)
    signature = inspect.Signature(parameters, return_annotation=Schedule)

    def make(*args: Any, **kwargs: Any) -> Schedule:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        for key, low in row.above.items():
            if isinstance(low, str):
                _check_above(f"{name}.{key}", values[key], values[low], f"{low} = {values[low]}")
            else:
                _check_above(f"{name}.{key}", values[key], low)
        return _float32(row.factory(**values, **({} if row.one is None else {row.one: 1.0})))

    make.__name__, make.__doc__ = name, row.factory.__doc__.strip().splitlines()[0]
    make.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return make


def _parameter(given: inspect.Parameter, defaults: Mapping[str, Number]) -> inspect.Parameter:
    """Give a keyword of optax, whose numbers may be arrays there, the type that a config has."""
    kind: Any = given.annotation if given.annotation in (int, bool) else Number
    if given.default is None:
        kind = kind | None
    default = defaults[given.name] if given.name in defaults else given.default
    return given.replace(annotation=kind, default=default)


LR_SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    **{name: _of_optax(name, row) for name, row in _OPTAX.items()},
    "piecewise_constant": piecewise_constant,
    "piecewise_interpolate": piecewise_interpolate,
    "inverse_sqrt": inverse_sqrt,
    "lambda_warmup_cosine": lambda_warmup_cosine,
    "lambda_warmup_cosine2": lambda_warmup_cosine2,
    "lambda_linear": lambda_linear,
}


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """Multiply a schedule by min((step + 1) / warmup_steps, 1): the first update already moves.

    `warmup_steps` = 0 returns the schedule as it is. The schedule's own steps are not shifted.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps = {warmup_steps} should be at least 0")
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
    """Repeat a linear warm-up from f_start to f_max, then after(n, warm, length, min, max)."""
    _check_same_length(
        name,
        warm_up_steps=warm_up_steps,
        f_min=f_min,
        f_max=f_max,
        f_start=f_start,
        cycle_lengths=cycle_lengths,
    )
    for i, length in enumerate(cycle_lengths):
        _check_above(f"{name}.cycle_lengths[{i}]", length)
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


def _pairs(name: str, boundaries: Sequence[int], scales: Sequence[Number]) -> dict[int, Number]:
    _check_same_length(name, boundaries=boundaries, scales=scales)
    return dict(zip(boundaries, scales, strict=True))


def _float32(schedule: Callable[[Any], Any]) -> Schedule:
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def _float(step: Any) -> jax.Array:
    return jnp.asarray(step, jnp.float32)


def _check_above(name: str, value: Number, low: Number = 0, text: str = "0") -> None:
    if not value > low:
        raise ValueError(f"{name} = {value} should be above {text}")


def _check_same_length(name: str, **lists: Sequence[Number]) -> None:
    lengths = {argument: len(values) for argument, values in lists.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"the lists of {name} should have one length, at least 1: {lengths}")
