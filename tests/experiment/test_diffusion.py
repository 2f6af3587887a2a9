"""A config whose model denoises: what it may say, and what its Task is made of."""

import jax
import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.diffusion import FIRST_STAGE_ONLY, make_diffusion

MNIST, LDM = "configs/mnist.py:tiny", "configs/emoji_ldm.py:tiny"


def make(path, **sections):
    experiment = built(path)
    return make_diffusion({**experiment.sections, **sections}, experiment.setting)


@pytest.mark.parametrize("name", FIRST_STAGE_ONLY)
def test_sections_of_first_stages_are_refused(name):
    with pytest.raises(ConfigError, match=rf"config\.{name} is for the training of first stages"):
        make(MNIST, **{name: {}})


def test_a_section_that_is_left_out_is_the_default():
    experiment = built(MNIST)
    left_out = ("conditioning", "schedule", "loss", "sampler", "guidance", "optimizer")
    model = {**experiment.sections["model"], "num_classes": None}
    task = make(MNIST, **dict.fromkeys(left_out), model=model)
    betas = np.asarray(task.constants["schedule"].betas)
    np.testing.assert_allclose(betas[[0, -1]], [1e-4, 2e-2], rtol=1e-5)  # linear, of 1000 steps
    assert task.drawing.num_steps == 50 and task.embedders == {}


def test_gradients_in_bfloat16_are_for_networks_in_bfloat16():
    experiment = built(MNIST)
    training = experiment.training._replace(gradient_dtype="bfloat16")
    setting = experiment.setting._replace(training=training)
    message = r"train\.gradient_dtype = 'bfloat16' should be 'float32' with config\.model\.dtype"
    with pytest.raises(ConfigError, match=message):
        make_diffusion(experiment.sections, setting)
    model = {**experiment.sections["model"], "dtype": "bfloat16"}
    task = make_diffusion({**experiment.sections, "model": model}, setting)
    state = jax.eval_shape(task.init, jax.random.key(0))
    batch, frozen = experiment.abstract_batch(), experiment.abstract_frozen()
    new, _ = jax.eval_shape(task.train_step, state, batch, frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(new.params)} == {np.dtype("float32")}


def test_buckets_need_sides_that_the_network_can_halve():
    experiment = built(LDM)
    options = {**experiment.data.batch_options, "buckets": True, "bucket_divisor": 6}
    setting = experiment.setting._replace(data=experiment.data._replace(batch_options=options))
    with pytest.raises(ConfigError, match=r"bucket_divisor = 6 should be a multiple of \d+, which"):
        make_diffusion(experiment.sections, setting)


def test_the_average_follows_every_parameter():
    params = trained(LDM).params
    assert built(LDM).task.averaged_part(params) is params


def test_only_a_scale_that_waits_for_the_first_batch_is_computed():
    """1 / std of what the encoder makes of the batch, whose value test_autoencoding.py checks."""
    given = built(LDM, "--config.first_stage.scale_by_std=False")
    assert given.task.first_frozen is built(MNIST).task.first_frozen is None
    assert built(LDM).task.first_frozen is not None


def test_random_frozen_networks_have_the_shapes_that_are_loaded():
    experiment = built(LDM)
    drawn = jax.eval_shape(experiment.task.init_frozen, jax.random.key(0))
    loaded = experiment.task.load_frozen(experiment.abstract_frozen(), lambda: drawn, None)
    assert jax.tree.structure(loaded["first_stage"]) == jax.tree.structure(drawn["first_stage"])
    assert loaded["conditioner"].keys() == drawn["conditioner"].keys()
