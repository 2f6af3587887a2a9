"""One update and one evaluation as pure functions.

All random numbers of step n come from fold_in(key(seed), n).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from diffusion_jax.models.layers.convolution import for_onednn
from diffusion_jax.randomness import Stream, sample_keys, step_key, stream_key
from diffusion_jax.train.compiler_options import (
    onednn_convolves,
    options_for_gpus,
    options_for_onednn,
)
from diffusion_jax.train.state import TrainState, strengthen
from diffusion_jax.types import Batch, PyTree

Metrics: TypeAlias = dict[str, jax.Array]
# (params, mutable, frozen, batch, keys [b], *, train: bool) -> (loss, (metrics, mutable)).
# Loss and metrics are means over the samples of the batch, weighted by batch["weight"] where there
# is one; batch["position"] int32 [b] is the place of each sample in the global batch, and in
# training batch["step"] int32 [b] is the number of the update.
LossFn: TypeAlias = Callable[..., tuple[Any, tuple[Mapping[str, Any], PyTree]]]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    accumulate: int = 1,
    rounded: Callable[[PyTree], PyTree] = lambda params: params,
) -> Callable[[TrainState, Batch, PyTree], tuple[TrainState, Metrics]]:
    """Make the function of one optimizer update: (state, batch, frozen) -> (state, metrics).

    Sample i of the global batch gets the key fold_in(fold_in(key(seed), state.step), i), whatever
    the number of devices, processes and micro-batches. With `accumulate` = A > 1 the gradient is
    summed over A micro-batches in one scan; it equals the gradient of the whole batch to float
    tolerance when the loss is a (weighted) mean over samples. Micro-batch j holds the samples j,
    j + A, ..., so that every device already has its share of each. Gradients are summed in float32;
    `mutable` passes through the micro-batches in order.

    rounded: params -> the parameters that the loss reads, some perhaps in fewer bits. Gradients are
      taken by these, in their dtypes, and the optimizer gets them in the dtypes of the state.

    Returns: a pure function, not jitted (`jit_train_step` does it). The metrics are float32
        scalars: the loss, the metrics of `loss_fn`, and grad_norm, the global norm before any
        clipping. The new state has the types of the old one.

    Raises:
        ValueError: `accumulate` is below 1, or the batch does not divide by it.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate = {accumulate} should be at least 1")
    tx = optax.with_extra_args_support(tx)

    def train_step(state: TrainState, batch: Batch, frozen: PyTree) -> tuple[TrainState, Metrics]:
        batch = with_positions(batch)
        batch = {**batch, "step": jnp.broadcast_to(state.step, batch["position"].shape)}
        key = step_key(seed, state.step)
        gradients, loss, metrics, mutable = _gradients(
            loss_fn, state, rounded(state.params), frozen, batch, key, accumulate=accumulate
        )
        gradients = strengthen(gradients, state.params)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(gradients)}

        def objective(params: PyTree) -> Any:
            keys = sample_keys(key, batch["position"])
            return loss_fn(params, state.mutable, frozen, batch, keys, train=True)[0]

        # value and obj_fn are for the few optimizers that ask for them (momo, polyak_sgd, sophia)
        updates, opt_state = tx.update(
            gradients, state.opt_state, state.params, value=loss, obj_fn=objective
        )
        params = optax.apply_updates(state.params, updates)
        new = strengthen(TrainState(state.step + 1, params, opt_state, mutable), state)
        return new, _float32(metrics)

    return train_step


def make_eval_step(
    loss_fn: LossFn, *, seed: int
) -> Callable[[PyTree, PyTree, PyTree, Batch, Any], Metrics]:
    """Make the function that evaluates: (params, mutable, frozen, batch, batch_number) -> metrics.

    Keys depend on (seed, batch_number, i) only, so every validation sees the same noise, and
    training never does. A batch that was padded to the full size has batch["weight"] [b], 1 for
    samples and 0 for padding: `loss_fn` sees it and returns weighted means. metrics["weight"] is
    its sum (without it, the batch size), with which `mean_metrics` averages.
    """

    def eval_step(
        params: PyTree, mutable: PyTree, frozen: PyTree, batch: Batch, batch_number: Any
    ) -> Metrics:
        batch = with_positions(batch)
        key = jax.random.fold_in(stream_key(seed, Stream.EVALUATION), batch_number)
        keys = sample_keys(key, batch["position"])
        loss, (metrics, _) = loss_fn(params, mutable, frozen, batch, keys, train=False)
        weight = jnp.sum(batch["weight"]) if "weight" in batch else keys.shape[0]
        return _float32({"loss": loss, **metrics, "weight": weight})

    return eval_step


def jit_train_step(
    train_step: Callable[[TrainState, Batch, PyTree], tuple[TrainState, Metrics]],
    state: TrainState,
    *,
    donate: bool = True,
) -> Callable[[TrainState, Batch, PyTree], tuple[TrainState, Metrics]]:
    """Jit a step whose new state lies where `state` does: it compiles once and reuses the memory.

    If the compiler placed the new state elsewhere, the next step would compile again, and nothing
    could be donated.

    Args:
        train_step: what make_train_step returns.
        state: the state, or its abstract form (`abstract_state`); only shardings are read.
        donate: False keeps the old state alive, for debugging.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    scalar = shardings.step
    metrics = (
        NamedSharding(scalar.mesh, PartitionSpec()) if isinstance(scalar, NamedSharding) else None
    )
    options = options_for_gpus(scalar.mesh) if metrics is not None else None
    traced = train_step
    if metrics is not None and onednn_convolves(scalar.mesh):
        options, traced = options_for_onednn(), _for_onednn(train_step)
    return jax.jit(
        traced,
        donate_argnums=(0,) if donate else (),
        out_shardings=(shardings, metrics),
        compiler_options=options,
    )


def _for_onednn(train_step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train_step)
    def traced(state: TrainState, batch: Batch, frozen: PyTree) -> tuple[TrainState, Metrics]:
        with for_onednn():
            return train_step(state, batch, frozen)

    return traced


def mean_metrics(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Average the metrics of eval batches on the host, weighted by their metrics["weight"].

    The arrays are fetched here, all at once, so that collecting them never waits for the device.
    Raises ValueError when there are no batches, or when their weights sum to 0.
    """
    batches = jax.device_get(list(metrics))
    weights = np.asarray([batch["weight"] for batch in batches], np.float64)
    if weights.sum() <= 0:
        raise ValueError(
            f"the weights of {len(batches)} eval batches sum to {weights.sum()}, which should be "
            "above 0"
        )
    names = [name for name in batches[0] if name != "weight"]
    return {
        name: float(np.average([float(batch[name]) for batch in batches], weights=weights))
        for name in names
    }


def _gradients(
    loss_fn: LossFn,
    state: TrainState,
    params: PyTree,
    frozen: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    *,
    accumulate: int,
) -> tuple[PyTree, Any, Mapping[str, Any], PyTree]:
    """Compute gradient, loss, metrics and new mutable collections of the whole batch."""
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, (metrics, mutable)), gradients = gradient_fn(
            params,
            state.mutable,
            frozen,
            batch,
            sample_keys(key, batch["position"]),
            train=True,
        )
        return gradients, loss, metrics, mutable

    def micro_step(carry: Any, micro: Any) -> Any:
        total, mutable = carry
        share, batch = micro
        keys = sample_keys(key, batch["position"])
        (loss, (metrics, new)), gradients = gradient_fn(
            params, mutable, frozen, batch, keys, train=True
        )
        total = jax.tree.map(lambda sum_, g: sum_ + share * g.astype(jnp.float32), total, gradients)
        return (total, strengthen(new, mutable)), _float32({"loss": loss, **metrics})

    micro_batches = _split(dict(batch), accumulate)
    shares = _shares(micro_batches, accumulate)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
    (gradients, mutable), metrics = jax.lax.scan(
        micro_step, (zeros, state.mutable), (shares, micro_batches)
    )
    metrics = {name: jnp.sum(shares * values) for name, values in metrics.items()}
    return gradients, metrics["loss"], metrics, mutable


def _split(tree: PyTree, parts: int) -> PyTree:
    """Reshape [b, ...] to [parts, b / parts, ...]; part j takes the rows j, j + parts, ..."""

    def split(leaf: Any) -> Any:
        if leaf.shape[0] % parts:
            raise ValueError(f"accumulate = {parts} should divide the batch of {leaf.shape[0]}")
        return leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _shares(micro_batches: Mapping[str, jax.Array], parts: int) -> jax.Array:
    """Compute what each micro-batch counts for in the mean over the batch, [parts], sum 1."""
    if "weight" not in micro_batches:
        return jnp.full((parts,), 1.0 / parts, jnp.float32)
    sums = jnp.sum(micro_batches["weight"].astype(jnp.float32), axis=1)
    return sums / jnp.sum(sums)


def with_positions(batch: Batch) -> Batch:
    """Number the samples of the global batch: add "position" int32 [b], 0 to b - 1.

    Raises ValueError when the arrays differ in their leading axis.
    """
    sizes = {name: leaf.shape[0] for name, leaf in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the arrays of a batch should have one leading axis, not {sizes}")
    return {**batch, "position": jnp.arange(next(iter(sizes.values())), dtype=jnp.int32)}


def _float32(metrics: Mapping[str, Any]) -> Metrics:
    return {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
