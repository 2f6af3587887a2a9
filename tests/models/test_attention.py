"""Attention against the formula in float64, and the two channel orders of the attention block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.attention import AttentionBlock, attention


def formula(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("blnd,bmnd->bnlm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnlm,bmnd->blnd", weights, v)


def drawn(dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 6, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8))
    return [
        (scale * jax.random.normal(k, s)).astype(dtype) for k, s in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_attention_is_the_formula(implementation):
    q, k, v = drawn()
    ours = attention(q, k, v, implementation=implementation)
    np.testing.assert_allclose(ours, formula(q, k, v), atol=1e-5)


def test_softmax_of_half_precision_is_float32():
    # Logits near 40: in bfloat16 their steps of 0.25 would be errors of 25 % in the weights.
    q, k, v = drawn(jnp.bfloat16, 4.0)
    ours = attention(q, k, v)
    assert ours.dtype == jnp.bfloat16
    wanted = formula(*(a.astype(jnp.float32) for a in (q, k, v)))
    np.testing.assert_allclose(ours.astype(jnp.float32), wanted, atol=2**-7 * np.abs(wanted).max())


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="'flash' is unknown; choose one of auto, xla, cudnn"):
        attention(*drawn(), implementation="flash")


@pytest.mark.parametrize("new_order", [False, True])
def test_block_orders_channels_by_head_or_by_role(new_order):
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 8))
    module = AttentionBlock(num_heads=2, new_order=new_order, num_groups=1)
    params = module.init(jax.random.key(1), x)["params"]
    np.testing.assert_array_equal(module.apply({"params": params}, x), x)  # proj_out starts at 0
    params["proj_out"]["kernel"] = jnp.eye(8)[None]

    tokens = np.asarray(x).reshape(2, 6, 8)
    normed = (tokens - tokens.mean((1, 2), keepdims=True)) / tokens.std((1, 2), keepdims=True)
    qkv = normed @ np.asarray(params["qkv"]["kernel"])[0] + np.asarray(params["qkv"]["bias"])
    if new_order:
        q, k, v = (part.reshape(2, 6, 2, 4) for part in np.split(qkv, 3, -1))
    else:
        q, k, v = np.moveaxis(qkv.reshape(2, 6, 2, 3, 4), 3, 0)
    wanted = tokens + formula(q, k, v).reshape(2, 6, 8)
    ours = module.apply({"params": params}, x).reshape(2, 6, 8)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_are_refused(heads):
    with pytest.raises(ValueError, match=f"num_heads = {heads} does not divide the 8 channels"):
        AttentionBlock(heads, num_groups=1).init(jax.random.key(0), jnp.ones((1, 2, 2, 8)))
