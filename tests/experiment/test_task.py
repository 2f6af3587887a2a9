"""What every maker of a Task promises to those above it, who do not ask what it made."""

import typing

import jax
import pytest
from support.experiments import built

from diffusion_jax.experiment.task import Task, Trained, Training

FUNCTIONS = [
    name
    for name, kind in typing.get_type_hints(Task).items()
    if "Callable" in str(kind) and name not in (*Task._field_defaults, "rules", "frozen_rules")
]


@pytest.mark.parametrize("name", ["mnist", "emoji_vae"])
def test_every_function_is_there_and_a_model_draws_or_reconstructs(name):
    task = built(f"configs/{name}.py:tiny").task
    assert len(FUNCTIONS) == 17 and all(callable(getattr(task, name)) for name in FUNCTIONS)
    assert (task.drawing is None) != (task.reconstructing is None)
    assert task.headline and all(isinstance(name, str) for name in task.headline)


@pytest.mark.parametrize("name", ["mnist", "emoji_vae"])
def test_averages_have_the_shapes_of_what_is_trained(name):
    experiment = built(f"configs/{name}.py:tiny")
    state = experiment.abstract_state()
    averaged = jax.eval_shape(experiment.task.averaged, state)
    assert jax.tree.structure(averaged) == jax.tree.structure(state.params)
    part = experiment.task.averaged_part(state.params)
    assert {leaf.shape for leaf in jax.tree.leaves(part)} <= {
        leaf.shape for leaf in jax.tree.leaves(state.params)
    }


def test_a_model_without_averages_and_a_plain_training():
    assert Trained({}, {}, {}).ema is None
    plain = Training(num_steps=1, batch_size=2)
    assert plain.ckpt_path is None and plain.accumulate == 1 and not plain.scale_lr
