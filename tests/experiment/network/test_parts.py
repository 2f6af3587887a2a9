"""Which weights are trained and which are frozen, and where a base comes from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained
from support.trees import drawn

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.parts import (
    all_trained,
    base_of,
    check_gradients,
    init_base,
    load_base,
    reading_of,
)
from diffusion_jax.train.checkpoints.saving import open_checkpoints

MNIST, SD15 = "configs/mnist.py:tiny", "configs/sd15.py:tiny"
TRAINED_TEXT = "--config.conditioning.embedders.text.trainable=True"


def base_shapes(experiment):
    shapes = jax.eval_shape(functools.partial(init_base, experiment.network), jax.random.key(0))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def test_without_a_section_the_network_is_trained_and_frozen_embedders_are_not():
    experiment = built(SD15)
    parts = all_trained(experiment.network, experiment.mesh, experiment.training)
    assert jax.eval_shape(parts.init, jax.random.key(0)).keys() == {"network", "conditioner"}
    frozen = jax.eval_shape(parts.init_frozen, jax.random.key(0))
    assert "network" not in frozen and frozen["conditioner"].keys() == {"text"}
    weights = trained(SD15)
    whole = parts.whole(weights.params, weights.frozen)
    assert whole[0] is weights.params and whole[1] is weights.frozen
    assert parts.merged(weights, jnp.float32) is weights
    assert parts.needs_base is None and parts.first_params is None and parts.adapters is None


@pytest.mark.parametrize("overrides", [(), (TRAINED_TEXT,)])
def test_a_base_is_the_network_with_all_its_embedders(overrides):
    shapes = base_shapes(built(SD15, *overrides))
    assert shapes.keys() >= {"network", "conditioner"}
    assert shapes["conditioner"].keys() == {"text"}
    plain = jax.eval_shape(built(SD15).network.init, jax.random.key(0))
    assert jax.tree.structure(shapes["network"]) == jax.tree.structure(plain["network"])
    trees = ({"network": 1, "conditioner": {"a": 2}}, {"conditioner": {"b": 3}, "other": 4})
    assert base_of(*trees) == {"network": 1, "conditioner": {"a": 2, "b": 3}}


def test_kernels_of_a_network_that_computes_in_bfloat16_are_kept_in_it():
    half = base_shapes(built(MNIST, "--config.model.dtype=bfloat16"))["network"]
    whole = base_shapes(built(MNIST))["network"]
    names = [path for path, leaf in jax.tree.leaves_with_path(half) if leaf.dtype == jnp.bfloat16]
    assert names and all(path[-1].key == "kernel" for path in names)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {np.dtype(np.float32)}


def save_run(folder, params):
    checkpoints = open_checkpoints(folder / "checkpoints")
    checkpoints.save(3, {"params": params}, {})
    checkpoints.close()
    return f"--config.train.ckpt_path={folder}"


def test_a_base_is_read_from_a_run(tmp_path):
    params = trained(MNIST).params
    experiment = built(MNIST, save_run(tmp_path / "run", params))
    shapes = base_shapes(experiment)
    frozen = load_base(experiment.network, experiment.training, shapes, lambda: {}, None)
    jax.tree.map(np.testing.assert_array_equal, frozen["network"], params["network"])


def test_a_base_without_one_of_its_weights_is_refused(tmp_path):
    params = trained(MNIST).params
    network = {name: leaf for name, leaf in params["network"].items() if name != "out_2"}
    path = save_run(tmp_path / "run", {**params, "network": network})
    experiment = built(MNIST, path)
    shapes = base_shapes(experiment)
    with pytest.raises(ConfigError, match="ckpt_path = '.*/run' has no network/out_2/bias, netw"):
        load_base(experiment.network, experiment.training, shapes, lambda: {}, None)


@pytest.mark.slow
def test_a_trained_encoder_is_read_from_a_released_file(tmp_path):
    experiment, path = built(SD15, TRAINED_TEXT), tmp_path / "base.safetensors"
    weights = trained(SD15, TRAINED_TEXT)._replace(ema=None)
    experiment.task.export_file(weights, path)
    shapes = base_shapes(experiment)
    random = lambda: drawn(shapes, 9)
    frozen = load_base(experiment.network, experiment.training, shapes, random, path)
    for part in ("network", "conditioner"):
        jax.tree.map(np.testing.assert_array_equal, frozen[part], weights.params[part])


def test_gradients_beside_a_frozen_base_are_not_rounded():
    training = built(SD15).training
    check_gradients(training, "config.x")
    half = training._replace(gradient_dtype="bfloat16", ckpt_check=False, ckpt_variant="fp16")
    with pytest.raises(ConfigError, match="'bfloat16' should be 'float32' with config.x"):
        check_gradients(half, "config.x")
    assert reading_of(half) == (False, "fp16")
