"""The spatial transformer: contexts, and the layouts that must not change its numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.devices.flops import jaxpr_flops
from diffusion_jax.models.layers.transformer import (
    GEGLU,
    CrossAttention,
    SpatialTransformer,
    stack_blocks,
    unstack_blocks,
)

FIELDS = {"num_heads": 2, "head_dim": 4, "depth": 3, "num_groups": 4}
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
CONTEXTS = tuple(jax.random.normal(jax.random.key(i), (2, 5, 6)) for i in range(1, 4))


def randomised(params, key=7):
    """Replace every parameter, so that nothing is zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    drawn = [0.5 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def compiled(function):
    """Compile with little optimisation: these functions run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def params():
    init = SpatialTransformer(**FIELDS).init
    return randomised(jax.eval_shape(init, jax.random.key(0), X, CONTEXTS)["params"])


@pytest.fixture(scope="module")
def plain_gradient(params):
    return gradient(params)


def apply(params, context, **fields):
    return compiled(SpatialTransformer(**FIELDS | fields).apply)({"params": params}, X, context)


def gradient(params, **fields):
    def loss(params):
        module = SpatialTransformer(**FIELDS | fields)
        return jnp.sum(jnp.square(module.apply({"params": params}, X, CONTEXTS)))

    return compiled(jax.grad(loss))(params)


def assert_trees_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize("context", [CONTEXTS[0], CONTEXTS], ids=["shared", "one each"])
@pytest.mark.parametrize("remat", [False, True])
def test_scan_changes_no_numbers(params, context, remat):
    stacked = apply(stack_blocks(params), context, scan=True, remat=remat)
    np.testing.assert_allclose(stacked, apply(params, context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_changes_no_gradient(params, plain_gradient, remat):
    assert_trees_close(gradient(params, remat=remat), plain_gradient)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_remat_recomputes_what_its_policy_says(params, scan):
    if scan:
        params = stack_blocks(params)

    def cost(remat):
        module = SpatialTransformer(**FIELDS, scan=scan, remat=remat)
        loss = lambda params: jnp.sum(module.apply({"params": params}, X, CONTEXTS[0]))
        gradient = jax.make_jaxpr(jax.grad(loss))(params)
        return jaxpr_flops(gradient), str(gradient).count("<host>")

    # Of a block with 16 tokens of width 8, 5 of the context: the two products of each attention.
    attention = 3 * 2 * 2 * 2 * (16 * 16 + 16 * 5) * 8
    plain, in_host_memory = cost("none")
    assert in_host_memory == 0 and cost(False) == cost("none")
    assert cost("dots") == (plain + attention, 0)
    everything, in_host_memory = cost("full")
    assert everything > plain + 2 * attention and in_host_memory == 0 and cost(True) == cost("full")
    computed, in_host_memory = cost("offload")
    assert computed == plain + attention and in_host_memory > 0


def test_scanned_gradients_are_the_stacked_ones(params, plain_gradient):
    ours = gradient(stack_blocks(params), scan=True, remat=True)
    assert_trees_close(unstack_blocks(ours), plain_gradient)


def test_stacking_can_be_undone(params):
    stacked = stack_blocks(params)
    assert "transformer_blocks_0" not in stacked
    assert stacked["transformer_blocks"]["attn1"]["to_q"]["kernel"].shape == (3, 8, 8)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, unstack_blocks(stacked), params))


def test_a_single_block_stays_as_it_is():
    module = SpatialTransformer(2, 4, num_groups=4, scan=True)
    single = compiled(module.init)(jax.random.key(0), X)["params"]
    assert "transformer_blocks_0" in single and stack_blocks(single).keys() == single.keys()


def test_scanned_blocks_start_different():
    init = compiled(SpatialTransformer(**FIELDS, scan=True).init)
    params = init(jax.random.key(0), X)["params"]
    kernel = params["transformer_blocks"]["attn1"]["to_q"]["kernel"]
    assert not jnp.allclose(kernel[0], kernel[1])


def test_a_new_transformer_is_the_identity():
    init = compiled(SpatialTransformer(**FIELDS).init_with_output)
    output, _ = init(jax.random.key(0), X)
    np.testing.assert_array_equal(output, X)


def test_each_block_sees_its_own_context(params):
    run = compiled(lambda *contexts: SpatialTransformer(**FIELDS).apply(variables, X, contexts))
    variables, output = {"params": params}, apply(params, CONTEXTS)
    for i in range(3):
        changed = [c + 1.0 if i == j else c for j, c in enumerate(CONTEXTS)]
        assert not jnp.allclose(output, run(*changed), atol=1e-2), i
    repeated = run(*(CONTEXTS[0],) * 3)
    np.testing.assert_allclose(repeated, apply(params, CONTEXTS[0]), rtol=1e-4, atol=1e-5)


def test_linear_projections_are_the_convolutions(params):
    linear = dict(params)
    for name in ("proj_in", "proj_out"):
        kernel = params[name]["kernel"]
        linear[name] = params[name] | {"kernel": kernel.reshape(kernel.shape[2:])}
    ours = apply(linear, CONTEXTS, use_linear=True)
    np.testing.assert_allclose(ours, apply(params, CONTEXTS), rtol=1e-4, atol=1e-5)


def test_two_contexts_for_three_blocks_are_refused(params):
    with pytest.raises(ValueError, match="got 2 contexts; give 1 for all blocks or 3"):
        apply(params, CONTEXTS[:2])


def test_context_tokens_may_come_in_any_order():
    module = CrossAttention(2, 4)
    x, context = X.reshape(2, 16, 8), CONTEXTS[0]
    variables = module.init(jax.random.key(0), x, context)
    assert "bias" not in variables["params"]["to_q"] and "bias" in variables["params"]["to_out_0"]
    assert variables["params"]["to_k"]["kernel"].shape == (6, 8)
    forwards, backwards = (module.apply(variables, x, c) for c in (context, context[:, ::-1]))
    np.testing.assert_allclose(forwards, backwards, atol=1e-6)


def loss_to_context(context):
    """Give (parameters, x) -> a number, for attention of 4 rows of x to this context."""
    module = CrossAttention(2, 4)

    def loss(params, x):
        return jnp.sum(jnp.sin(module.apply({"params": params}, x, context)))

    return loss


def test_one_token_of_context_is_as_two_equal_ones():
    """Attention to two equal tokens is to each by half; it runs all of the layers."""
    x, one = X.reshape(4, 8, 8), CONTEXTS[0][:, :1]
    init = jax.eval_shape(CrossAttention(2, 4).init, jax.random.key(0), x, one)
    params = randomised(init["params"])
    assert sorted(params) == ["to_k", "to_out_0", "to_q", "to_v"]
    both = [
        jax.value_and_grad(loss_to_context(jnp.repeat(one, count, 1)), argnums=(0, 1))(params, x)
        for count in (1, 2)
    ]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-5)
    for ours, theirs in zip(*(jax.tree.leaves(found[1]) for found in both), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not jax.tree.leaves(both[0][1][0]["to_q"])[0].any() and not both[0][1][1].any()


def test_one_token_of_context_costs_its_own_products_alone():
    x, one = X.reshape(4, 8, 8), CONTEXTS[0][:, :1]
    params = jax.eval_shape(CrossAttention(2, 4).init, jax.random.key(0), x, one)["params"]
    traced = jax.make_jaxpr(loss_to_context(one))(params, x)
    assert jaxpr_flops(traced) == 2 * 2 * (6 * 8 + 8 * 8)  # two rows: to_v and to_out


def test_contexts_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match="got 2 contexts, which do not divide the 3 rows of x"):
        jax.eval_shape(
            CrossAttention(2, 4).init,
            jax.random.key(0),
            X[:1].reshape(1, 16, 8).repeat(3, 0),
            CONTEXTS[0],
        )


def test_geglu_gates_by_the_exact_gelu():
    module = GEGLU(3)
    x = jnp.linspace(-3.0, 3.0, 8)[None, None, :]
    variables = module.init(jax.random.key(0), x)
    proj = variables["params"]["proj"]
    value, gate = np.split(
        np.asarray(x @ proj["kernel"].reshape(1, 8, 6) + proj["bias"][None, None]), 2, -1
    )
    gelu = [0.5 * g * (1 + math.erf(g / 2**0.5)) for g in gate.ravel()]
    np.testing.assert_allclose(module.apply(variables, x).ravel(), value.ravel() * gelu, rtol=1e-5)
