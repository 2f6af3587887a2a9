"""Which weights are trained and which are frozen, alone: what adapters and ControlNets share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.experiment.binding import ConfigError
from diffusion_jax.experiment.parts import (
    all_trained,
    base_of,
    check_gradients,
    init_base,
    load_base,
    reading_of,
)
from diffusion_jax.experiment.task import Trained, Training

PATH = "configs/sd15.py:tiny"


def training(**changed):
    return built(PATH).training._replace(**changed)


def test_without_a_base_all_is_trained():
    experiment = built(PATH)
    parts = all_trained(experiment.network, experiment.mesh, experiment.training)
    weights = Trained({"network": 1}, {}, {"conditioner": 2}, None)
    assert parts.whole(weights.params, weights.frozen) == (weights.params, weights.frozen)
    assert parts.merged(weights, None) is weights
    assert parts.needs_base is None and parts.first_params is None
    shapes = jax.eval_shape(parts.init, jax.random.key(0))
    assert shapes.keys() == experiment.abstract_state().params.keys()


def test_a_base_holds_the_network_and_all_embedders():
    params = {"network": {"w": 1}, "conditioner": {"label": 2}}
    frozen = {"conditioner": {"text": 3}, "first_stage": 4}
    assert base_of(params, frozen) == {
        "network": {"w": 1},
        "conditioner": {"text": 3, "label": 2},
    }


def test_random_weights_of_a_base_differ_from_the_frozen_ones_and_may_be_halved():
    network = built(PATH).network
    key = jax.random.key(0)
    shapes = jax.eval_shape(functools.partial(init_base, network), key)
    assert shapes.keys() >= {"network", "conditioner"}
    leaf = lambda tree: tree["network"]["input_blocks_0_0"]["kernel"]
    assert leaf(shapes).dtype == jnp.float32
    half = network._replace(module=network.module.clone(dtype=jnp.bfloat16))
    assert leaf(jax.eval_shape(functools.partial(init_base, half), key)).dtype == jnp.bfloat16


def test_a_base_comes_out_of_a_released_file(tmp_path):
    experiment, weights = built(PATH), trained(PATH)
    file = tmp_path / "base.safetensors"
    experiment.task.export_file(weights, file)
    network = experiment.network
    abstract = base_of(weights.params, weights.frozen)
    abstract = {**weights.frozen, **abstract}
    given = training(ckpt_path=str(file))
    found = load_base(network, given, abstract, lambda: weights.frozen, None)
    jax.tree.map(np.testing.assert_array_equal, found["network"], weights.params["network"])
    missing = tmp_path / "missing.safetensors"
    with pytest.raises((ConfigError, FileNotFoundError), match="missing.safetensors"):
        load_base(network, training(ckpt_path=str(missing)), abstract, lambda: weights.frozen, None)


def test_how_files_are_read_is_said_in_the_training_section():
    found = reading_of(training(ckpt_variant="fp16"))
    assert found == (built(PATH).training.ckpt_check, "fp16")


def test_gradients_beside_a_frozen_base_are_not_rounded():
    check_gradients(Training(num_steps=1, batch_size=1), "config.adapters")
    rounded = Training(num_steps=1, batch_size=1, gradient_dtype="bfloat16")
    with pytest.raises(
        ConfigError, match=r"gradient_dtype = 'bfloat16' should be 'float32' with config.adapters"
    ):
        check_gradients(rounded, "config.adapters")
