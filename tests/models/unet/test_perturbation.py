"""Identity attention in the middle block: the values themselves, and nothing else changes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import drawn

from diffusion_jax.models.layers.attention import identity_attention
from diffusion_jax.models.layers.transformer import CrossAttention
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.unet.perturbation import identity_in_the_middle

SMALL = dict(
    model_channels=8, out_channels=1, num_res_blocks=1, channel_mult=(1,),
    num_heads=2, num_groups=4, attention_resolutions=(1,),
)  # fmt: skip


def test_each_token_gets_its_own_value():
    """The linear layers of attention, without its map, by hand."""
    module = CrossAttention(num_heads=2, head_dim=3)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), x))
    with identity_attention():
        found = module.apply(params, x, rngs={"dropout": jax.random.key(0)})
    own, x = jax.tree.map(np.asarray, (params["params"], x))
    expected = x @ own["to_v"]["kernel"] @ own["to_out_0"]["kernel"] + own["to_out_0"]["bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(found - module.apply(params, jnp.asarray(x))).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("transformer", [False, True])
def test_the_middle_block_alone_is_perturbed(transformer):
    more = dict(use_spatial_transformer=True, context_dim=6) if transformer else {}
    module = UNet(**SMALL, **more)
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([3, 7])
    context = jax.random.normal(jax.random.key(1), (2, 4, 6)) if transformer else None
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t, context=context))
    params = jax.tree.map(jnp.asarray, drawn(shapes))

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, worse):
        with identity_in_the_middle() if worse else contextlib.nullcontext():
            return module.apply(params, x, t, context=context)

    assert np.abs(run(params, True) - run(params, False)).max() > 1e-4
    # Without the output of the middle attention there is nothing left that could differ.
    middle = params["params"]["middle_block_1"]
    own = middle["transformer_blocks_0"]["attn1"]["to_out_0"] if transformer else middle["proj_out"]
    own.update(jax.tree.map(jnp.zeros_like, dict(own)))
    np.testing.assert_array_equal(run(params, True), run(params, False))
