"""Adapters as trees: which layers get them, how they start, and that merging changes no output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.dit import DiT
from diffusion_jax.models.layers.low_rank import heeding
from diffusion_jax.models.layers.transformer import SpatialTransformer
from diffusion_jax.train.adapters import (
    Adapter,
    Wanted,
    adapt,
    choose_layers,
    init_adapters,
    is_stacked,
    layers_of,
    merge,
)

TREE = {
    "a_0": {
        "to_q": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        "norm": {"scale": jnp.ones(6)},
    },
    "a_11": {"to_q": {"kernel": jnp.ones((4, 6))}, "conv": {"kernel": jnp.ones((3, 3, 4, 6))}},
}


def test_patterns_choose_layers_and_the_first_one_decides():
    assert [*layers_of(TREE)] == ["a_0/to_q", "a_11/to_q", "a_11/conv"]
    wanted = {"x": Wanted("a_0", Adapter(2)), "y": Wanted("to_q$", Adapter(3, 0.5))}
    assert choose_layers(TREE, wanted) == {"a_0/to_q": Adapter(2), "a_11/to_q": Adapter(3, 0.5)}


def test_a_pattern_that_is_found_nowhere_is_told_with_the_layers_there_are():
    message = r"^here = 'attn' should be found in .*; there are a_N/to_q, a_N/conv, where N"
    with pytest.raises(ValueError, match=message):
        choose_layers(TREE, {"here": Wanted("attn", Adapter(2))})


def test_adapters_start_as_a_layer_of_torch_and_change_nothing():
    chosen = {"a_0/to_q": Adapter(2), "a_11/conv": Adapter(3)}
    found = init_adapters(jax.random.key(0), TREE, chosen, dora=True)
    shapes = jax.tree.map(np.shape, found, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    assert shapes == {
        "a_0": {"to_q": {"down": (4, 2), "up": (2, 6), "magnitude": (6,)}},
        "a_11": {"conv": {"down": (3, 3, 4, 3), "up": (3, 6), "magnitude": (6,)}},
    }
    down = np.abs(found["a_11"]["conv"]["down"])
    assert 0.9 / 6 < down.max() <= 1 / 6  # 1 / sqrt(3 * 3 * 4)
    merged = merge(adapt(TREE, found, chosen))
    jax.tree.map(lambda ours, own: np.testing.assert_allclose(ours, own, rtol=1e-6), merged, TREE)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_a_scanned_transformer_draws_the_same_with_merged_kernels(dora):
    """Blocks of a stack have factors of their own, and the norms of DoRA go over one block."""
    module = SpatialTransformer(1, 8, depth=2, num_groups=2, scan=True, use_linear=True)
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 8))
    base = module.init(jax.random.key(1), x)["params"]
    base = jax.tree.map(lambda leaf: leaf + 0.1, base)  # the last layer starts at 0
    chosen = {path: Adapter(2, 0.5) for path in layers_of(base)}
    assert {path.partition("/")[0] for path in chosen} > {"proj_in"} and len(chosen) > 8
    adapters = init_adapters(jax.random.key(2), base, chosen, dora=dora)
    adapters = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(3), leaf.shape), adapters
    )
    adapted = adapt(base, adapters, chosen)
    with heeding(adapted):
        found = module.apply({"params": adapted}, x)
    expected = module.apply({"params": merge(adapted)}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - module.apply({"params": base}, x)).max() > 0.1
    key = "transformer_blocks/attn1/to_q"
    assert is_stacked(f"network/x/{key}") and not is_stacked("x/transformer_blocks_0/attn1/to_q")


@pytest.mark.slow
def test_a_scanned_transformer_over_patches_draws_the_same_with_merged_kernels():
    module = DiT(3, 16, depth=2, num_heads=2, scan=True)
    x, t = jax.random.normal(jax.random.key(0), (1, 4, 4, 3)), jnp.ones((1,))
    base = module.init(jax.random.key(1), x, t)["params"]
    base = jax.tree.map(lambda leaf: leaf + 0.1, base)  # gates start at 0
    chosen = {path: Adapter(2, 0.5) for path in layers_of(base) if "mlp" in path or "attn" in path}
    adapters = init_adapters(jax.random.key(2), base, chosen)
    assert adapters["blocks"]["attn_qkv"]["down"].shape == (2, 16, 2)
    adapters = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(3), leaf.shape), adapters
    )
    adapted = adapt(base, adapters, chosen, dropout=0.5)  # which drawing does without
    with heeding(adapted):
        found = module.apply({"params": adapted}, x, t)
    expected = module.apply({"params": merge(adapted)}, x, t)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - module.apply({"params": base}, x, t)).max() > 0.01


def test_merged_kernels_have_the_dtype_that_is_asked_for():
    tree = {"a": {"kernel": jnp.ones((4, 6), jnp.bfloat16)}}
    adapters = init_adapters(jax.random.key(0), tree, {"a": Adapter(2)})
    adapted = adapt(tree, adapters, {"a": Adapter(2)}, dropout=0.1)
    assert adapted["a"]["keep"] == np.float32(0.9) and merge(adapted)["a"].keys() == {"kernel"}
    assert merge(adapted)["a"]["kernel"].dtype == jnp.bfloat16
    assert merge(adapted, jnp.float32)["a"]["kernel"].dtype == jnp.float32
