"""The autoencoder against diffusers' AutoencoderKL and VQModel: outputs and every gradient.

Every weight is random and none is zero. diffusers writes 1 x 1 convolutions of the attention as
dense layers and counts the levels of its decoder from the lowest resolution.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import autoencoder_fixtures as fixtures

from diffusion_jax.models.first_stage.autoencoder import Autoencoder

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", fixtures.CASES)
def test_outputs_and_gradients_are_those_of_diffusers(name):
    pytest.importorskip("diffusers")
    fields = fixtures.CASES[name][0]
    theirs, their_grads = fixtures.run_diffusers(*fixtures.CASES[name])
    module = Autoencoder(**fields)
    image, cotangents = fixtures.inputs(fields)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(image))["params"]
    shapes = jax.tree.map(lambda a: a.shape, shapes)
    params = jax.tree.map(jnp.asarray, fixtures.drawn_tree(shapes))
    assert shapes == jax.tree.map(lambda a: a.shape, their_grads)

    def loss(params, image):
        moments = module.apply({"params": params}, image, method="encode")
        z = moments[..., : module.embed_dim]
        decoded = module.apply({"params": params}, z, method="decode")
        total = jnp.sum(moments * cotangents[0]) + jnp.sum(decoded * cotangents[1])
        return total, (moments, decoded)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, image_grad), (moments, decoded) = gradient(params, jnp.asarray(image))
    ours = {"moments": moments, "decoded": decoded, "image": image_grad}
    errors = {k: np.abs(ours[k] - their).max() / np.abs(their).max() for k, their in theirs.items()}
    shown = ", ".join(f"{k} {error:.1e}" for k, error in errors.items())
    # Some gradients are zero but for rounding, that of the keys' bias, say.
    floor = 0.01 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(their_grads))

    def compare(path, ours, their):
        error = np.abs(ours - their).max() / max(np.abs(their).max(), floor)
        errors[jax.tree_util.keystr(path)] = error

    jax.tree_util.tree_map_with_path(compare, grads, their_grads)
    worst = max(errors, key=errors.get)
    print(f"{shown}, worst {worst} {errors[worst]:.1e}")
    assert errors[worst] < 1e-4, (worst, errors[worst])
