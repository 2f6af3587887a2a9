"""The transformer over patches: its start, its sizes, its positions, and scanned blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.dit import BLOCKS, DiT, rope_angles, rotated, sincos_positions
from diffusion_jax.models.layers.transformer import stack_blocks, unstack_blocks

SMALL = dict(out_channels=3, hidden_size=16, depth=2, num_heads=2)


def inputs(size=8):
    return jax.random.normal(jax.random.key(0), (2, size, size, 3)), jnp.array([3, 700])


def moved(params, seed=1):
    """Parameters that are nowhere 0."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return jax.tree.unflatten(tree, [p + 0.1 * jax.random.normal(k, p.shape) for p, k in pairs])


def made(model, *args, **kwargs):
    return moved(jax.jit(model.init)(jax.random.key(0), *args, **kwargs)["params"])


@pytest.mark.slow
def test_it_begins_with_zeros_and_blocks_that_change_nothing():
    x, t = inputs()
    model = DiT(**SMALL)
    params = model.init(jax.random.key(0), x, t)["params"]
    assert not np.any(model.apply({"params": params}, x, t))
    params["final_layer_linear"] = moved(params["final_layer_linear"])
    shallow = {k: v for k, v in params.items() if not k.startswith(BLOCKS)}
    without = DiT(**SMALL | {"depth": 0}).apply({"params": shallow}, x, t)
    np.testing.assert_array_equal(model.apply({"params": params}, x, t), without)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "published"), [((384, 12, 6), 33), ((768, 12, 12), 130), ((1152, 28, 16), 675)]
)
def test_the_published_models_have_their_millions_of_parameters(size, published):
    """Table 1 of the paper, of models in latents with the classes of ImageNet."""
    width, depth, heads = size
    model = DiT(4, width, depth, heads, num_classes=1001, learn_sigma=True, patch_size=2)
    x, t, y = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, y=y))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert abs(count / 1e6 - published) < 0.6


@pytest.mark.slow
def test_scanned_and_rematerialised_blocks_give_the_same_numbers():
    x, t = inputs()
    plain = DiT(**SMALL, num_classes=5, qk_norm=True, position="rope")
    y = jnp.array([1, 4])
    params = made(plain, x, t, y=y)
    expected = plain.apply({"params": params}, x, t, y=y)
    scanned = DiT(**SMALL, num_classes=5, qk_norm=True, position="rope", scan=True, remat="dots")
    stacked = stack_blocks(params)
    assert BLOCKS in stacked and jax.tree.structure(unstack_blocks(stacked)) == jax.tree.structure(
        params
    )
    found = jax.jit(scanned.apply)({"params": stacked}, x, t, y=y)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_rotated_products_depend_on_the_distance_alone():
    """q_a . k_b is a function of the difference of the two places, along both axes."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    angles = jnp.asarray(rope_angles(5, 6, 16))

    def product(a, b):
        places = [angles[None, p[0] * 6 + p[1]] for p in (a, b)]
        return float(jnp.sum(rotated(q, places[0]) * rotated(k, places[1])))

    assert product((0, 0), (2, 1)) == pytest.approx(product((2, 4), (4, 5)), abs=1e-5)
    assert product((0, 0), (0, 0)) == pytest.approx(float(jnp.sum(q * k)), abs=1e-5)
    assert abs(product((0, 0), (2, 1)) - product((0, 0), (1, 2))) > 1e-3


def test_positions_are_the_closed_form():
    table = sincos_positions(3, 4, 8).reshape(3, 4, 8)
    row, column = 2, 3
    expected = [
        *np.sin([column, column / 100]), *np.cos([column, column / 100]),
        *np.sin([row, row / 100]), *np.cos([row, row / 100]),
    ]  # fmt: skip
    np.testing.assert_allclose(table[row, column], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_context_and_features_change_the_output():
    x, t = inputs()
    model = DiT(**SMALL, context_dim=6, num_classes="sequential", adm_in_channels=5)
    context, y = jnp.ones((2, 7, 6)), jnp.ones((2, 5))
    params = made(model, x, t, context, y)
    base = model.apply({"params": params}, x, t, context, y)
    assert np.abs(base - model.apply({"params": params}, x, t, 2 * context, y)).max() > 1e-4
    assert np.abs(base - model.apply({"params": params}, x, t, context, 2 * y)).max() > 1e-4


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"hidden_size": 20}, {}, "hidden_size = 20 should be a multiple of 4 num_heads = 8"),
        ({"patch_size": 3}, {}, "8 x 8 pixels; both should be multiples of patch_size = 3"),
        ({"position": "learned"}, {}, "position = 'learned' is unknown; choose from sincos, rope"),
        ({"num_classes": 3}, {}, "y is missing and num_classes = 3"),
        ({"num_classes": "sequential"}, {}, "'sequential' with adm_in_channels"),
        ({}, {"context": jnp.ones((2, 3, 4))}, "is given and context_dim = None"),
    ],
)
def test_what_does_not_fit_is_told(fields, arguments, message):
    x, t = inputs()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: DiT(**SMALL | fields).init(jax.random.key(0), x, t, **arguments))


def test_a_duration_changes_nothing_at_first_and_something_later():
    x, t = inputs()
    plain, model = DiT(**SMALL), DiT(**SMALL, embeds_duration=True)
    duration = jnp.array([0.0, 600.0])
    start = jax.jit(model.init)(jax.random.key(0), x, t)["params"]
    params = moved(start)
    last = "duration_embedder_mlp_2"
    still = params | {last: start[last]}
    own = {name: leaf for name, leaf in still.items() if not name.startswith("duration")}
    wanted = plain.apply({"params": own}, x, t)
    np.testing.assert_allclose(
        model.apply({"params": still}, x, t, duration=duration), wanted, rtol=1e-5, atol=1e-6
    )
    first, second = (model.apply({"params": params}, x, t, duration=d) for d in (duration, None))
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5, atol=1e-6)
    assert np.abs(first[1] - second[1]).max() > 1e-4
    with pytest.raises(ValueError, match="duration is given and embeds_duration = False"):
        plain.apply({"params": own}, x, t, duration=duration)
