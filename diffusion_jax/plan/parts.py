"""The programs of a run besides its training step, lowered for devices that may not be there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.runs.arguments import arguments_of
from diffusion_jax.train.step import jit_train_step


def lower_train(built: Experiment) -> Any:
    """Lower the training step, with its state donated."""
    arguments = arguments_of(built)
    return jit_train_step(built.train_step, arguments[0]).lower(*arguments)


def lower_eval(built: Experiment) -> Any:
    """Lower the evaluation of one batch."""
    state = built.abstract_state()
    batch, frozen = built.abstract_batch(), built.abstract_frozen()
    number = jax.ShapeDtypeStruct((), jnp.int32)
    step = jax.jit(built.eval_step)
    return step.lower(state.params, state.mutable, frozen, batch, number)


def lower_sample(built: Experiment) -> Any:
    """Lower the drawing of one batch, guided where the model can be, from noise to images."""

    def draw(params: Any, frozen: Any, inputs: Any, keys: Any) -> Any:
        return built.sample_fn(params, frozen, inputs, keys, num_steps=3).x

    return jax.jit(draw).lower(*sample_arguments(built))


def sample_arguments(built: Experiment) -> tuple[Any, ...]:
    """Make the arguments of a sample_fn for one batch, (params, frozen, inputs, keys), abstract."""
    size = built.training.batch_size
    inputs = {name: leaf for name, leaf in built.abstract_batch().items() if name != "image"}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    return built.abstract_state().params, built.abstract_frozen(), inputs, keys


def parts_of(built: Experiment) -> dict[str, Callable[[Experiment], Any]]:
    """Name the programs that a run of this experiment compiles."""
    parts: dict[str, Callable[[Experiment], Any]] = {"train": lower_train, "eval": lower_eval}
    return parts | ({"sample": lower_sample} if built.task.drawing is not None else {})
