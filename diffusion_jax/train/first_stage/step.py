"""One update and one evaluation of a first stage and its discriminator, as pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.randomness import sample_keys, step_key
from diffusion_jax.train.ema import ema_params
from diffusion_jax.train.first_stage.loss import (
    AutoencoderLoss,
    GeneratorPass,
    Networks,
    check_loss,
    discriminator_pass,
    generator_pass,
    reconstruct,
    with_stills,
)
from diffusion_jax.train.state import TrainState, strengthen
from diffusion_jax.train.step import Metrics, make_eval_step, with_positions
from diffusion_jax.types import Batch, Keys, PyTree

SCHEDULES = ("both", "alternate")
# Parameters that the autoencoder's optimizer trains and its EMA averages.
TRAINED = ("autoencoder", "loss")


class _Recipe(NamedTuple):
    """What is the same at every step."""

    networks: Networks
    loss: AutoencoderLoss
    tx: optax.GradientTransformationExtraArgs
    disc_tx: optax.GradientTransformationExtraArgs
    reuse_reconstruction: bool


class _Step(NamedTuple):
    """What an update reads besides the state."""

    frozen: PyTree
    batch: Batch
    keys: Keys
    later_keys: Keys
    active: Array


class _Adversary(NamedTuple):
    """All that a step of the discriminator changes."""

    params: PyTree
    opt_state: PyTree
    mutable: PyTree


_Turn: TypeAlias = tuple[TrainState, Mapping[str, Array]]


def init_autoencoder_state(
    params: Mapping[str, PyTree],
    tx: optax.GradientTransformation,
    disc_tx: optax.GradientTransformation,
    *,
    regularizer: PyTree = None,
    discriminator: PyTree = None,
) -> TrainState:
    """Make the state before the first update.

    Its opt_state has {"autoencoder", "discriminator"}, its mutable {"regularizer",
    "discriminator"}.

    Args:
        params: {"autoencoder": ..., "loss": {"logvar": scalar} or {} for a fixed one,
            "discriminator": ...}; ValueError for other names.
        tx: trains the first two, and keeps the EMA if there is one.
        disc_tx: trains the discriminator.
        regularizer: its mutable collections (codebook averages).
        discriminator: its mutable collections (BatchNorm statistics).
    """
    expected = {*TRAINED, "discriminator"}
    if set(params) != expected:
        raise ValueError(f"params has {sorted(params)} and should have {sorted(expected)}")
    opt_state = init_optimizers(params, tx, disc_tx)
    mutable = {
        "regularizer": {} if regularizer is None else regularizer,
        "discriminator": {} if discriminator is None else discriminator,
    }
    return strengthen(TrainState(jnp.zeros((), jnp.int32), dict(params), opt_state, mutable))


def init_optimizers(
    params: Mapping[str, PyTree],
    tx: optax.GradientTransformation,
    disc_tx: optax.GradientTransformation,
) -> dict[str, PyTree]:
    """Make the opt_state that params begin with, see init_autoencoder_state."""
    return {
        "autoencoder": tx.init(_trained(params)),
        "discriminator": disc_tx.init(params["discriminator"]),
    }


def averaged_params(state: TrainState) -> dict[str, PyTree]:
    """Return the parameters with averages of the autoencoder and the loss.

    Raises ValueError when the optimizer keeps no average.
    """
    return {**state.params, **ema_params(state.opt_state)}


def make_autoencoder_step(
    networks: Networks,
    loss: AutoencoderLoss,
    tx: optax.GradientTransformation,
    disc_tx: optax.GradientTransformation,
    *,
    seed: int,
    schedule: Literal["both", "alternate"] = "both",
    reuse_reconstruction: bool = True,
) -> Callable[[TrainState, Batch, PyTree], tuple[TrainState, Metrics]]:
    """Make the function of one update: (state, batch, frozen) -> (state, metrics), not jitted.

    Before state.step, which counts batches, reaches loss.disc_start, only the autoencoder is
    trained, and nothing of the discriminator changes, not even the step count of its optimizer; but
    networks.prepare, if there is one, sets it up from the first batch. The collections of the
    regularizer change with the autoencoder only.

    Keys follow from (seed, state.step, position of the sample), as in make_train_step. Metrics are
    float32 scalars: loss (= loss/total), the metrics of generator_pass, loss/disc, logits/real and
    logits/fake. All are there at every step, whichever network it trains, so that their means over
    steps are means over batches.

    Args:
        networks: the networks.
        loss: the options of the loss.
        tx: for {"autoencoder", "loss"}, with clipping and EMA inside.
        disc_tx: for the discriminator, without an EMA.
        seed: where all keys come from.
        schedule: "both" trains the autoencoder and then the discriminator on every batch
            (latent-diffusion); "alternate" trains the autoencoder at even steps and the
            discriminator at odd ones (generative-models).
        reuse_reconstruction: with "both", show the discriminator the reconstruction from before
            the autoencoder's update. False reconstructs again from the updated parameters with
            another latent sample, exactly as latent-diffusion does, for one more forward pass.

    Raises:
        ValueError: the schedule is unknown, or an option of the loss is out of range.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_loss(loss)
    recipe = _Recipe(
        networks,
        loss,
        optax.with_extra_args_support(tx),
        optax.with_extra_args_support(disc_tx),
        reuse_reconstruction,
    )
    advance = _both if schedule == "both" else _alternate

    def train_step(state: TrainState, batch: Batch, frozen: PyTree) -> tuple[TrainState, Metrics]:
        batch = with_positions(batch)
        key = step_key(seed, state.step)
        keys = jax.vmap(lambda key: jax.random.split(key, 2))(sample_keys(key, batch["position"]))
        active = state.step >= loss.disc_start
        step = _Step(frozen, batch, keys[:, 0], keys[:, 1], active)
        if networks.prepare is not None:
            ready = networks.prepare(state.params["discriminator"], batch["image"])
            state = state._replace(params={**state.params, "discriminator": ready})
        new, metrics = advance(recipe, state, step)
        metrics = {"loss": metrics["loss/total"], **metrics}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return new._replace(step=state.step + 1), metrics

    return train_step


def make_autoencoder_eval_step(
    networks: Networks, loss: AutoencoderLoss, *, seed: int
) -> Callable[[PyTree, PyTree, PyTree, Batch, Any], Metrics]:
    """Make the function that evaluates: (params, mutable, frozen, batch, batch_number) -> metrics.

    It is make_eval_step with the metrics of training. Networks run with train = False. The
    discriminator always takes part, with d_weight = 1, before disc_start too, so that losses of
    different steps can be compared. Pass state.params or `averaged_params(state)`.
    Raises ValueError when an option of the loss is out of range.
    Source: generative-models, GeneralLPIPSWithDiscriminator in eval mode.
    """
    check_loss(loss)

    def loss_fn(
        params: PyTree, mutable: PyTree, frozen: PyTree, batch: Batch, keys: Keys, *, train: bool
    ) -> tuple[Float[Array, ""], tuple[Mapping[str, Array], PyTree]]:
        seen = generator_pass(
            with_stills(networks, batch),
            loss,
            params,
            mutable,
            frozen,
            batch,
            keys,
            active=True,
            train=train,
        )
        _, (metrics, _) = discriminator_pass(
            networks,
            loss,
            params["discriminator"],
            mutable["discriminator"],
            batch["image"],
            seen.reconstruction,
            batch["weight"] if "weight" in batch else None,
            train=train,
        )
        return seen.loss, ({**seen.metrics, **metrics}, mutable)

    return make_eval_step(loss_fn, seed=seed)


def _both(recipe: _Recipe, state: TrainState, step: _Step) -> _Turn:
    """Train the autoencoder, then the discriminator on what it makes."""
    seen = _look(recipe, state, step)
    state = _train_generator(recipe, state, seen)

    def discriminate() -> tuple[_Adversary, Mapping[str, Array]]:
        fake = seen.reconstruction
        if not recipe.reuse_reconstruction:
            fake, _, _ = reconstruct(
                with_stills(recipe.networks, step.batch),
                state.params["autoencoder"],
                state.mutable["regularizer"],
                step.batch["image"].astype(jnp.float32),
                step.later_keys,
                train=True,
                step=state.step,
            )
        return _train_adversary(recipe, _adversary(state), step, fake)

    def only_log() -> tuple[_Adversary, Mapping[str, Array]]:
        adversary = _adversary(state)
        return adversary, _logged(recipe, adversary, step, seen.reconstruction)

    adversary, metrics = jax.lax.cond(step.active, discriminate, only_log)
    return _with_adversary(state, adversary), {**seen.metrics, **metrics}


def _alternate(recipe: _Recipe, state: TrainState, step: _Step) -> _Turn:
    """Train one of both, by the parity of the step; one program holds the two."""

    def generator_turn(state: TrainState, step: _Step) -> _Turn:
        seen = _look(recipe, state, step)
        metrics = _logged(recipe, _adversary(state), step, seen.reconstruction)
        return _train_generator(recipe, state, seen), {**seen.metrics, **metrics}

    def discriminator_turn(state: TrainState, step: _Step) -> _Turn:
        seen = _look(recipe, state, step)
        adversary, metrics = _train_adversary(recipe, _adversary(state), step, seen.reconstruction)
        return _with_adversary(state, adversary), {**seen.metrics, **metrics}

    turn = step.active & (state.step % 2 == 1)
    return jax.lax.cond(turn, discriminator_turn, generator_turn, state, step)


def _look(recipe: _Recipe, state: TrainState, step: _Step) -> GeneratorPass:
    return generator_pass(
        with_stills(recipe.networks, step.batch),
        recipe.loss,
        state.params,
        state.mutable,
        step.frozen,
        step.batch,
        step.keys,
        active=step.active,
        train=True,
        step=state.step,
    )


def _train_generator(recipe: _Recipe, state: TrainState, seen: GeneratorPass) -> TrainState:
    trained: PyTree = _trained(state.params)
    updates, opt_state = recipe.tx.update(
        seen.gradients(), state.opt_state["autoencoder"], trained, value=seen.loss
    )
    trained = optax.apply_updates(trained, updates)
    params = {**state.params, **trained}
    opt_state = {**state.opt_state, "autoencoder": opt_state}
    return strengthen(TrainState(state.step, params, opt_state, seen.mutable), state)


def _train_adversary(
    recipe: _Recipe, old: _Adversary, step: _Step, fake: Array
) -> tuple[_Adversary, Mapping[str, Array]]:
    def loss_fn(params: PyTree) -> Any:
        return _disc_loss(recipe, old._replace(params=params), step, fake)

    (value, (metrics, mutable)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(old.params)
    updates, opt_state = recipe.disc_tx.update(gradients, old.opt_state, old.params, value=value)
    new = _Adversary(optax.apply_updates(old.params, updates), opt_state, mutable)
    return strengthen(new, old), metrics


def _disc_loss(recipe: _Recipe, adversary: _Adversary, step: _Step, fake: Array) -> Any:
    return discriminator_pass(
        recipe.networks,
        recipe.loss,
        adversary.params,
        adversary.mutable,
        step.batch["image"],
        fake,
        step.batch["weight"] if "weight" in step.batch else None,
        train=True,
    )


def _trained(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {name: params[name] for name in TRAINED}


def _adversary(state: TrainState) -> _Adversary:
    name = "discriminator"
    return _Adversary(state.params[name], state.opt_state[name], state.mutable[name])


def _with_adversary(state: TrainState, new: _Adversary) -> TrainState:
    name = "discriminator"
    return state._replace(
        params={**state.params, name: new.params},
        opt_state={**state.opt_state, name: new.opt_state},
        mutable={**state.mutable, name: new.mutable},
    )


def _logged(
    recipe: _Recipe, adversary: _Adversary, step: _Step, fake: Array
) -> Mapping[str, Array]:
    """Compute the metrics of a discriminator that is not trained; its loss is 0 before disc_start.

    Upstream logs the same. It costs one forward pass over the images and the reconstructions.
    """
    metrics = _disc_loss(recipe, adversary, step, fake)[1][0]
    return {**metrics, "loss/disc": jnp.where(step.active, metrics["loss/disc"], 0.0)}
