"""The fields dtype and param_dtype that modules share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.layers.dtypes import Dtypes


class Half(Dtypes, nn.Module):
    features: int = 2

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, **self.dtypes)(x)


def test_layers_compute_in_one_dtype_and_store_in_the_other():
    module = Half(3, dtype=jnp.bfloat16)
    x = jnp.ones((1, 4))
    params = module.init(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = module.apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16 and out.shape == (1, 3)
    assert Half().dtypes == {"dtype": jnp.float32, "param_dtype": jnp.float32}
