"""The compiled ways between images and what a network denoises."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built, trained


@pytest.mark.slow
def test_the_coders_are_the_first_stage_and_its_scale_factor():
    path = "configs/sd15.py:tiny"
    experiment, frozen = built(path), trained(path).frozen
    stage, coders = experiment.network.first_stage, experiment.drawing.coders
    assert stage is not None
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    found = np.asarray(coders.encode(frozen, images))
    params = {"params": frozen["first_stage"]}
    moments = stage.module.apply(params, jnp.asarray(images), method="encode")
    want = 0.18215 * np.asarray(moments)[..., :4]
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())
    back = np.asarray(coders.decode(frozen, found))
    want = stage.module.apply(params, jnp.asarray(found / 0.18215), method="decode")
    np.testing.assert_allclose(back, want, atol=1e-4 * np.abs(np.asarray(want)).max())
