"""Attention against the formula in float64, and the two channel orders of the attention block."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from diffusion_jax.devices.mesh import MESH_AXES
from diffusion_jax.models.layers.attention import AttentionBlock, attention


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
    with pytest.raises(ValueError, match="'tri' is unknown; choose one of auto, xla, cudnn, flash"):
        attention(*drawn(), implementation="tri")


def kernels(mesh, queries, keys, implementation="auto", dtype=jnp.bfloat16):
    """Names of the kernels that attention becomes for the devices of a mesh, not for this host."""
    shapes = [jax.ShapeDtypeStruct((4, n, 2, 64), dtype) for n in (queries, keys, keys)]
    trace = jax.make_jaxpr(functools.partial(attention, implementation=implementation))
    if mesh is None:
        return set(re.findall(r"splash|cudnn", str(trace(*shapes))))
    with jax.sharding.use_abstract_mesh(mesh):
        return set(re.findall(r"splash|cudnn", str(trace(*shapes))))


def mesh_of(platform, sizes=(1, 2, 2, 1)):
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    axes = (AxisType.Auto,) * 4
    return AbstractMesh(sizes, MESH_AXES, axes, abstract_device=device)


def test_auto_chooses_for_the_devices_of_the_mesh():
    tpu, cpu = mesh_of("tpu"), mesh_of("cpu")
    assert kernels(tpu, 1024, 1024) == {"splash"}
    assert kernels(tpu, 1024, 77) == set()  # keys of a text
    assert kernels(tpu, 256, 256) == set()  # a short sequence
    assert kernels(cpu, 1024, 1024) == set()
    assert kernels(None, 1024, 1024) == set()  # the tests run on CPU


def test_flash_is_for_more_keys_than_a_text_has():
    tpu = mesh_of("tpu")
    assert kernels(tpu, 256, 256, "flash") == {"splash"}
    assert kernels(tpu, 4096, 77, "flash") == set()


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
