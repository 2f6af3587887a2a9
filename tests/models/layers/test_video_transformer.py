"""The transformer over pixels and time: what its blocks see, and layouts that change no numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.layers.transformer import (
    SpatialTransformer,
    stack_blocks,
    unstack_blocks,
)
from diffusion_jax.models.layers.video_transformer import (
    SpatialVideoTransformer,
)

CLIPS, FRAMES = 2, 3
FIELDS = {"num_heads": 2, "head_dim": 4, "depth": 2, "num_groups": 4}
X = jax.random.normal(jax.random.key(0), (CLIPS * FRAMES, 2, 4, 8))
CONTEXT = jax.random.normal(jax.random.key(1), (CLIPS, 5, 6))
VIDEO = jnp.zeros((CLIPS, FRAMES))


def drawn(module, *inputs):
    """Parameters without zeros."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    values = [0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def compiled(function):
    """Compile with little optimisation: these functions run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def params():
    return drawn(SpatialVideoTransformer(**FIELDS), X, VIDEO, CONTEXT, CONTEXT)


def run(params, x=X, indicator=VIDEO, context=CONTEXT, time_context=CONTEXT, **fields):
    module = SpatialVideoTransformer(**FIELDS | fields)
    return compiled(module.apply)({"params": params}, x, indicator, context, time_context)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_changes_no_numbers(params, remat):
    stacked = stack_blocks(params)
    assert {"transformer_blocks", "time_stack"} <= stacked.keys()
    assert stacked["time_stack"]["attn1"]["to_q"]["kernel"].shape == (2, 8, 8)
    ours = run(stacked, scan=True, remat=remat)
    np.testing.assert_allclose(ours, run(params), rtol=1e-5, atol=1e-5)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, unstack_blocks(stacked), params))


def test_scanned_parameters_are_those_of_the_layout(params):
    module = SpatialVideoTransformer(**FIELDS, scan=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, VIDEO, CONTEXT, CONTEXT)["params"]
    assert jax.eval_shape(stack_blocks, params) == shapes


def test_a_clip_shares_its_context_as_if_every_frame_had_it(params):
    each = jnp.repeat(CONTEXT, FRAMES, axis=0)
    np.testing.assert_allclose(run(params, context=each), run(params), rtol=1e-5, atol=1e-5)


def test_images_skip_time(params):
    fields = {"merge_strategy": "learned_with_images"}
    params = params | {"time_mixer": {"mix_factor": jnp.array([-0.7])}}
    spatial = {name: leaf for name, leaf in params.items() if not name.startswith("time")}
    alone = SpatialTransformer(**FIELDS)
    each = jnp.repeat(CONTEXT, FRAMES, axis=0)
    wanted = compiled(alone.apply)({"params": spatial}, X, each)
    ours = run(params, indicator=VIDEO.at[1].set(1.0), **fields)
    np.testing.assert_allclose(ours[FRAMES:], wanted[FRAMES:], rtol=1e-5, atol=1e-5)
    assert not np.allclose(ours[:FRAMES], wanted[:FRAMES], atol=1e-2)
