"""Attention against the formula in float64, and the two channel orders of the attention block."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from diffusion_jax.devices.mesh import MESH_AXES
from diffusion_jax.models.layers import attention as module
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


def mesh_of(platform, sizes=(1, 2, 2, 1), kind=None):
    device = AbstractDevice(device_kind=kind or platform, num_cores=1, platform=platform)
    axes = (AxisType.Auto,) * 4
    return AbstractMesh(sizes, MESH_AXES, axes, abstract_device=device)


def test_auto_chooses_for_the_devices_of_the_mesh():
    tpu, cpu = mesh_of("tpu"), mesh_of("cpu")
    assert kernels(tpu, 1024, 1024) == {"splash"}
    assert kernels(tpu, 1024, 77) == set()  # keys of a text
    assert kernels(tpu, 256, 256) == set()  # a short sequence
    assert kernels(cpu, 1024, 1024) == set()
    assert kernels(None, 1024, 1024) == set()  # the tests run on CPU


H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def cudnn(monkeypatch):
    """Let jax believe that cuDNN is installed; the kernel is only traced and lowered."""
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91002)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)
    module._jax_refuses.cache_clear()
    yield
    module._jax_refuses.cache_clear()


def lowered(queries, keys, kind=H100, head_dim=64, dtype=jnp.bfloat16, implementation="auto"):
    """Lower forward and backward pass for a GPU -> whether cuDNN's kernels are in both."""
    q, k = (jax.ShapeDtypeStruct((2, n, 4, head_dim), dtype) for n in (queries, keys))

    def loss(q, k, v):
        out = attention(q, k, v, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh_of("gpu", (1, 1, 1, 1), kind)):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = {bool(re.search(rf"__cudnn\$fmha{name}\b", text)) for name in
             ("Softmax", "SoftmaxBackward")}  # fmt: skip
    assert len(found) == 1
    return found.pop()


def test_training_steps_can_be_lowered_for_gpus_without_one(cudnn):
    """Every kind of layer of SD and SDXL: what cuDNN refuses in training falls to XLA."""
    assert lowered(4096, 4096)
    assert lowered(4096, 4096, A100)
    assert lowered(4096, 77)  # keys of a text, padded
    assert not lowered(4096, 1)  # one embedding of an image
    assert not lowered(49, 49)  # 7 x 7 pixels
    assert not lowered(256, 256, head_dim=160)  # SD 1, on a host without a GPU
    assert not lowered(256, 256, head_dim=12)
    assert not lowered(4096, 4096, dtype=jnp.float32)
    assert not lowered(4096, 4096, "NVIDIA T4")  # compute capability 7.5, and not in CHIPS
    assert lowered(4096, 4096, dtype=jnp.float16, implementation="cudnn")
    assert not lowered(49, 77, implementation="cudnn")


@pytest.mark.slow
def test_padded_keys_change_nothing(monkeypatch):
    """With the masks of cuDNN's kernel, computed by XLA."""
    inner = jax.nn.dot_product_attention
    calls = []

    def by_xla(q, k, v, *, implementation, **kwargs):
        calls.append(k.shape[1])
        return inner(q, k, v, implementation="xla", **kwargs)

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, n, 2, 8)) for key, n in zip(keys, (6, 37, 37), strict=True)
    )
    loss = lambda attend: jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), argnums=(0, 1, 2))
    expected = loss(inner)(q, k, v)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    found = loss(module._cudnn_attention)(q, k, v)
    assert calls == [40]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_without_cudnn_a_gpu_is_lowered_for_by_xla():
    module._jax_refuses.cache_clear()
    if fused_attention_stablehlo.cuda_versions is None:
        assert not lowered(4096, 4096)


def test_wide_heads_are_for_gpus_from_hopper_on(cudnn, monkeypatch):
    """Where this host has such a GPU, for jax asks for it."""
    check = lambda capability: (9, 0) >= tuple(int(n) for n in capability.split("."))
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", check)
    assert lowered(256, 256, H100, head_dim=160)
    assert not lowered(256, 256, A100, head_dim=160)
    assert not lowered(256, 256, H100, head_dim=264)


def test_cudnn_by_name_says_once_why_it_is_not_used(cudnn, caplog):
    module._say_once.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(3):
            assert not lowered(49, 77, implementation="cudnn")
            assert not lowered(49, 49)  # auto says nothing
    (record,) = caplog.records
    assert re.match(
        "attention of 49 queries to 77 keys, heads of width 64, is computed by XLA and not by "
        "cuDNN: Unsupported sequence length Q 49, KV 80",
        record.getMessage(),
    )


def test_a_gpu_of_this_host_is_asked_for_its_capability(monkeypatch):
    gpu = types.SimpleNamespace(device_kind="NVIDIA X", platform="gpu", compute_capability="12.1")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert module._capability("NVIDIA X") == (12, 1) and module._capability("NVIDIA Y") is None
    assert module._target() == ("gpu", "NVIDIA X")
    other = types.SimpleNamespace(device_kind="AMD", platform="gpu", compute_capability="gfx942")
    monkeypatch.setattr(jax, "devices", lambda: [other])
    assert "AMD is no GPU of NVIDIA" in module.cudnn_refuses(
        (1, 8, 1, 64), (1, 8, 1, 64), "bfloat16", "AMD"
    )


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
