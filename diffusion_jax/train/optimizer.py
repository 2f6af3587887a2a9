"""The optimizer of a run: clipping, any optax optimizer by name, and the EMA, in one chain."""

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from diffusion_jax.train.adapters import kinds_of
from diffusion_jax.train.checkpoints.checksums import named_leaves
from diffusion_jax.train.ema import ema, late
from diffusion_jax.train.optimizer_state import averaging_evaluated, is_schedule_free
from diffusion_jax.train.power_ema import power_ema
from diffusion_jax.train.rounding import check_dtype, round_at_random
from diffusion_jax.types import PyTree


class Optimizer(NamedTuple):
    """An optax transformation, and its learning rate as a function of the step, float32."""

    tx: optax.GradientTransformationExtraArgs
    lr_at: Callable[[Any], jax.Array]


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-2,
    mask: Any = None,
    nesterov: bool = False,
    nu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Make AdamW (arXiv:1711.05101) with the defaults of torch: all parameters decay, by 1e-2.

    nu_dtype: of the second moment, which "bfloat16" rounds at random: the change of one step is
      below half of its last bit.
    """
    if nu_dtype is None:
        return optax.adamw(
            learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
        )
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return optax.chain(
        _with_nu_in(nu_dtype, adam),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _with_nu_in(dtype: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the second moment of optax's Adam in a dtype, and let Adam compute in float32."""
    check_dtype("nu_dtype", dtype)

    def init(params: PyTree) -> Any:
        state: Any = adam.init(params)
        return state._replace(nu=optax.tree.cast(state.nu, dtype))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        in_float32 = state._replace(nu=optax.tree.cast(state.nu, jnp.float32))
        updates, new = adam.update(updates, in_float32, params)
        new: Any = new
        return updates, new._replace(nu=round_at_random(new.nu, dtype, new.count))

    return optax.GradientTransformation(init, update)


# Functions of optax that have a learning rate but cannot stand alone in a chain, and why.
NOT_OPTIMIZERS = {
    "dpsgd": "it needs the gradient of every sample on its own",
    "lbfgs": "its line search needs many losses in one step",
    "mechanize": "it wraps another optimizer; prodigy, dog and dowg find their step sizes alone",
    "sam": "it wraps two other optimizers and takes gradients at two places in turn",
    "schedule_free": "it wraps another optimizer; schedule_free_adamw and schedule_free_sgd exist",
}
# Optimizers of optax.contrib whose functions do not say what they return.
_UNSAID = ("dog", "dowg")


def _factories(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Find the functions of an optax module that turn a learning rate into a transformation."""
    found = {}
    for name, function in sorted(vars(module).items()):
        if not inspect.isfunction(function) or name.startswith(("_", "scale_by_")):
            continue
        signature = inspect.signature(function)
        makes_transformation = name in _UNSAID or "GradientTransformation" in str(
            signature.return_annotation
        )
        if makes_transformation and _learning_rate_name(signature) and name not in NOT_OPTIMIZERS:
            found[name] = function
    return found


def _learning_rate_name(signature: inspect.Signature) -> str | None:
    names = ("learning_rate", "max_learning_rate")
    return next((name for name in names if name in signature.parameters), None)


# name -> factory: every optimizer of optax and optax.contrib, with our own adamw in front.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    **_factories(optax.contrib),
    **_factories(optax),
    "adamw": adamw,
}
WEIGHT_DECAY_MASKS = ("all", "kernels")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Options that say how much of an average stays at each step.
_SHARES = ("b1", "b2", "b3", "adam_b1", "adam_b2", "beta", "decay", "momentum", "rho")


def make_optimizer(
    name: str = "adamw",
    *,
    learning_rate: float | int = 1e-4,
    lr_multiplier: Callable[[Any], Any] | None = None,
    gradient_clip_norm: float | int | None = None,
    weight_decay_mask: str = "all",
    ema_decay: float | None = 0.9999,
    ema_use_num_updates: bool = True,
    trainable: str | None = None,
    ema_dtype: Literal["float32", "bfloat16"] = "float32",
    power: Sequence[float] = (),
    ema_start_step: int = 0,
    ema_update_every: int = 1,
    conditioner_lr_factor: float | int = 1.0,
    **options: Any,
) -> Optimizer:
    """Make the chain clip -> optimizer -> EMA, and the learning rate as a function of the step.

    The state is a dictionary: "clip", "optimizer" and, with averages, "ema" and "power_ema".
    Moments have the dtype of the parameters unless an option says otherwise (mu_dtype). Averages of
    a schedule-free optimizer follow what it evaluates, see optimizer_state.evaluation_params.

    Args:
        name: a row of `OPTIMIZERS`.
        learning_rate: base learning rate (`scaled_learning_rate` for the scale_lr rule).
        lr_multiplier: step -> factor, made by a row of `train.lr_schedules.LR_SCHEDULES`.
        gradient_clip_norm: largest global norm of the gradient, None for no clipping.
        weight_decay_mask: "all" decays every parameter, as torch does; "kernels" spares biases,
            norm scales and other vectors.
        ema_decay: see `train.ema.ema`; None keeps none, or what a schedule-free one evaluates.
        ema_use_num_updates: see `train.ema.ema`.
        trainable: see `trainable_mask`; the other parameters have no moments. Their gradients
            should be 0, as `only_trainable` makes them.
        ema_dtype: see `train.ema.ema`.
        power: see `train.power_ema.power_ema`; () keeps no such averages.
        ema_start_step: see `train.ema.late`.
        ema_update_every: see `train.ema.late`.
        conditioner_lr_factor: multiplies the learning rate of encoders, see `with_slower_encoders`.
        **options: keywords of the optax factory.

    Raises:
        ValueError: an unknown name, option or mask, a number out of range, or a schedule for an
            optimizer that takes a constant learning rate only.
    """
    signature = inspect.signature(_lookup(name))
    _check_options(name, signature, options)
    _check_rate(learning_rate)

    def lr_at(step: Any) -> jax.Array:
        factor = 1.0 if lr_multiplier is None else lr_multiplier(step)
        return jnp.asarray(learning_rate * factor, jnp.float32)

    rate = _rate(name, signature, learning_rate, lr_at, scheduled=lr_multiplier is not None)
    mask = _mask(name, signature, weight_decay_mask)
    chosen = _chosen(name, {**rate, **mask}, options)
    chosen = with_slower_encoders(chosen, name, conditioner_lr_factor)
    if trainable is not None:
        chosen = optax.masked(chosen, functools.partial(trainable_mask, trainable))
    average = ema(0.0) if is_schedule_free(name) else None
    if ema_decay is not None:
        average = ema(ema_decay, use_num_updates=ema_use_num_updates, dtype=ema_dtype)
        average = late(average, start_step=ema_start_step, update_every=ema_update_every)
    averages = [] if average is None else [("ema", average)]
    averages += [("power_ema", power_ema(power))] if power else []
    links = [("clip", _clipping(gradient_clip_norm)), ("optimizer", chosen)]
    if is_schedule_free(name):
        return Optimizer(averaging_evaluated(optax.named_chain(*links), averages), lr_at)
    return Optimizer(optax.named_chain(*links, *averages), lr_at)


def _check_rate(rate: float | int) -> None:
    if not 0 <= rate <= _FLOAT32_MAX:
        raise ValueError(
            f"optimizer.learning_rate = {rate} should be at least 0, and finite in float32"
        )


def _clipping(limit: float | int | None) -> optax.GradientTransformation:
    if limit is not None and not limit > 0:
        raise ValueError(f"optimizer.gradient_clip_norm = {limit} should be above 0")
    return optax.identity() if limit is None else optax.clip_by_global_norm(limit)


def with_slower_encoders(
    optimizer: optax.GradientTransformation, name: str, factor: float | int
) -> optax.GradientTransformation:
    """Multiply what an optimizer does to the encoders of conditions, whose paths say conditioner.

    Raises ValueError for optimizers whose steps are no multiples of a learning rate, and when there
    are no such parameters.
    """
    if factor == 1.0:
        return optimizer
    if is_schedule_free(name):
        raise ValueError(f"optimizer.conditioner_lr_factor = {factor} should be 1 with {name}")
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        if "conditioner" not in params or not jax.tree.leaves(params["conditioner"]):
            raise ValueError(
                f"optimizer.conditioner_lr_factor = {factor} should be 1: no encoder is trained; "
                "train.trainable may name one"
            )
        return optimizer.init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **more: Any
    ) -> tuple[PyTree, Any]:
        updates, state = optimizer.update(updates, state, params, **more)
        slower = jax.tree.map(lambda leaf: leaf * factor, updates["conditioner"])
        return {**updates, "conditioner": slower}, state

    return optax.GradientTransformationExtraArgs(init, update)


def scaled_learning_rate(
    base_learning_rate: float | int, global_batch_size: int, *, scale_lr: bool = True
) -> float | int:
    """Multiply a learning rate by the samples of one update, unless scale_lr is False.

    global_batch_size counts the samples of all devices and micro-batches.
    Source: latent-diffusion, scale_lr (accumulate_grad_batches * num_gpus * batch_size).
    """
    return base_learning_rate * global_batch_size if scale_lr else base_learning_rate


def kernels_mask(params: PyTree) -> PyTree:
    """Mark what "kernels" decays with True: all but biases, norm scales and other vectors."""

    def decays(path: Any, leaf: Any) -> bool:
        last = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and last not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def trainable_mask(pattern: str, params: PyTree) -> PyTree:
    """Mark with True the parameters in whose path, such as "network/out_2/bias", pattern is found.

    Raises ValueError when it is found in none.
    """
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: bool(
            re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/"))
        ),
        params,
    )
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"train.trainable = {pattern!r} should be found in a parameter's path; there are "
            f"{kinds_of(named_leaves(params))}"
        )
    return mask


def only_trainable(pattern: str, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a LossFn have no gradient but by the parameters that trainable_mask marks."""

    def loss(params: PyTree, *args: Any, **keywords: Any) -> Any:
        return loss_fn(frozen_others(pattern, params), *args, **keywords)

    return loss


def frozen_others(pattern: str, params: PyTree) -> PyTree:
    """Stop the gradient of all parameters that trainable_mask does not mark."""
    return jax.tree.map(
        lambda trains, leaf: leaf if trains else jax.lax.stop_gradient(leaf),
        trainable_mask(pattern, params),
        params,
    )


def _lookup(name: str) -> Callable[..., Any]:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if name in NOT_OPTIMIZERS:
        raise ValueError(f"optimizer.name = {name!r} cannot be used: {NOT_OPTIMIZERS[name]}")
    close = difflib.get_close_matches(name, OPTIMIZERS, n=5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise ValueError(
        f"optimizer.name = {name!r} is unknown; {hint}choose from {', '.join(sorted(OPTIMIZERS))}"
    )


def _chosen(
    name: str, own: dict[str, Any], options: dict[str, Any]
) -> optax.GradientTransformation:
    try:
        return _lookup(name)(**own, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer.name = {name!r} does not take {options}: {error}") from error


def _check_options(name: str, signature: inspect.Signature, options: dict[str, Any]) -> None:
    reserved = {"learning_rate", "max_learning_rate", "mask", "weight_decay_mask"}
    choices = [option for option in signature.parameters if option not in reserved]
    for option, value in options.items():
        if option not in choices:
            raise ValueError(
                f"optimizer.{option} = {value!r} is not an option of {name}; "
                f"choose from {', '.join(choices)}"
            )
        if option == "b1" and is_schedule_free(name) and value == 0:
            raise ValueError(f"optimizer.b1 = {value!r} should be above 0 with {name}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"optimizer.{option} = {value!r} should be finite")
        if option in _SHARES and isinstance(value, float | int) and not 0 <= value < 1:
            raise ValueError(f"optimizer.{option} = {value!r} should be at least 0 and below 1")


def _rate(
    name: str,
    signature: inspect.Signature,
    learning_rate: float | int,
    lr_at: Callable[[Any], jax.Array],
    *,
    scheduled: bool,
) -> dict[str, Any]:
    """Return the factory's keyword for the learning rate: the schedule, where it takes one."""
    argument = _learning_rate_name(signature)
    assert argument is not None
    if "Callable" in str(signature.parameters[argument].annotation):
        return {argument: lr_at}
    if scheduled:
        raise ValueError(
            f"optimizer.name = {name!r} takes a constant learning rate only; "
            "remove the schedule and the warm-up, or choose another optimizer"
        )
    return {argument: learning_rate}


def _mask(name: str, signature: inspect.Signature, mask: str) -> dict[str, Any]:
    if mask not in WEIGHT_DECAY_MASKS:
        raise ValueError(
            f"optimizer.weight_decay_mask = {mask!r} is unknown; "
            f"choose from {', '.join(WEIGHT_DECAY_MASKS)}"
        )
    if mask == "all":
        return {}
    for argument in ("mask", "weight_decay_mask"):
        if argument in signature.parameters:
            return {argument: kernels_mask}
    raise ValueError(
        f"optimizer.weight_decay_mask = {mask!r} should be 'all': {name} has no mask for its "
        "weight decay"
    )
