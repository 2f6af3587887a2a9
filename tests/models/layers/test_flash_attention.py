"""The kernel, interpreted on CPU, against XLA's attention: values, gradients, padding, meshes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from diffusion_jax.devices.flops import count_flops
from diffusion_jax.devices.mesh import MESH_AXES, batch_sharding, make_mesh, on_mesh, replicated
from diffusion_jax.models.layers import flash_attention as module
from diffusion_jax.models.layers.flash_attention import flash_attention
from diffusion_jax.models.layers.transformer import SpatialTransformer

interpreted = functools.partial(flash_attention, interpret=True)
plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")


def drawn(queries, keys, *, batch=2, heads=2, head_dim=64, dtype=jnp.float32):
    shapes = [(batch, n, heads, head_dim) for n in (queries, keys, keys, queries)]
    random = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, s, dtype) for k, s in zip(random, shapes, strict=True)]


def output_and_gradients(attend, q, k, v, cotangent):
    out, transpose = jax.vjp(attend, q, k, v)
    return (out, *transpose(cotangent))


def agree(attend, arrays, tolerance):
    found = jax.jit(functools.partial(output_and_gradients, attend))(*arrays)
    wanted = output_and_gradients(plain, *arrays)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(a, np.float32) for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"),
    [(256, 256, 64), (200, 130, 40), (77, 300, 64)],
    ids=["whole tiles", "all padded", "fewer queries than a tile"],
)
def test_values_and_gradients_are_those_of_xla(queries, keys, head_dim):
    agree(interpreted, drawn(queries, keys, batch=1, head_dim=head_dim), 1e-5)


def test_half_precision():
    agree(interpreted, drawn(300, 300, batch=1, dtype=jnp.bfloat16), 1e-2)


@pytest.mark.parametrize("max_fused_tiles", [8, 0], ids=["one backward kernel", "two"])
def test_several_tiles_of_keys(monkeypatch, max_fused_tiles):
    monkeypatch.setattr(module, "TILES", (128,))
    monkeypatch.setattr(module, "MAX_FUSED_TILES", max_fused_tiles)
    agree(interpreted, drawn(300, 400, batch=1, heads=1), 1e-5)


def test_one_backward_kernel_takes_five_products_instead_of_seven(monkeypatch):
    shapes = [jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)] * 3
    product = 2 * 4096 * 4096 * 64

    def products():
        loss = lambda q, k, v: jnp.sum(flash_attention(q, k, v))
        return round(count_flops(jax.grad(loss, (0, 1, 2)), *shapes) / product, 1)

    assert products() == 2 + 5
    monkeypatch.setattr(module, "MAX_FUSED_TILES", 0)
    assert products() == 2 + 7


@pytest.mark.parametrize(
    ("length", "head_dim", "tile"),
    [(4096, 64, 1024), (4096, 512, 512), (1600, 64, 256), (3952, 64, 1024), (130, 64, 128)],
)
def test_tiles_fit_the_memory_and_pad_little(length, head_dim, tile):
    assert module._tile(length, head_dim) == tile


def test_devices_keep_their_samples_and_heads():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    arrays = jax.device_put(drawn(128, 128, batch=4), batch_sharding(mesh))
    agree(on_mesh(mesh, interpreted), arrays, 1e-5)
    compiled = jax.jit(on_mesh(mesh, interpreted)).lower(*arrays[:3]).compile()
    assert compiled.output_shardings.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert not re.search(r"all-gather|all-reduce", compiled.as_text())


def test_what_does_not_divide_is_not_split():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    arrays = jax.device_put(drawn(128, 128, batch=3, heads=1), replicated(mesh))
    agree(on_mesh(mesh, interpreted), arrays, 1e-5)

    axes = (AxisType.Auto,) * len(MESH_AXES)
    spec = functools.partial(module._spec, AbstractMesh((1, 2, 2, 2), MESH_AXES, axes))
    batch = ("slices", "data", "fsdp")
    assert spec(batch=8, heads=2) == PartitionSpec(batch, None, "tensor")
    assert spec(batch=6, heads=2) == PartitionSpec(None, None, "tensor")
    assert spec(batch=8, heads=3) == PartitionSpec(batch, None, None)


def test_inside_of_scan_remat_and_vmap():
    arrays = drawn(128, 128, batch=1, heads=1)

    def loss(attend, q, k, v, weight):
        layer = jax.checkpoint(lambda h, _: (attend(h, k, v), None))
        h, _ = jax.lax.scan(layer, q, length=2)
        return jnp.sum(h * weight)

    ours = jax.jit(jax.grad(functools.partial(loss, interpreted)))(*arrays)
    theirs = jax.grad(functools.partial(loss, plain))(*arrays)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)

    stacked = [jnp.stack([a, -a]) for a in arrays[:3]]
    found = jax.jit(jax.vmap(interpreted))(*stacked)
    np.testing.assert_allclose(found, jax.vmap(plain)(*stacked), atol=1e-5)


def test_no_matrix_of_logits_is_ever_held():
    shapes = [jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)] * 3
    loss = lambda attend, *x: jnp.sum(attend(*x))
    largest = {}
    for name, attend in {"flash": flash_attention, "xla": plain}.items():
        text = str(jax.make_jaxpr(jax.grad(functools.partial(loss, attend)))(*shapes))
        sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)]
        largest[name] = max(sizes)
    assert largest["xla"] == 4096**2
    assert largest["flash"] <= 1024**2


def test_remat_runs_the_kernel_again_or_keeps_what_it_gave():
    x = jax.ShapeDtypeStruct((4, 16, 16, 64), jnp.float32)

    def flops(remat):
        block = SpatialTransformer(1, 64, remat=remat, attention_impl="flash")
        params = jax.eval_shape(block.init, jax.random.key(0), x)
        loss = lambda params, x: jnp.sum(block.apply(params, x))
        return count_flops(jax.grad(loss), params, x)

    assert flops("dots") == flops("none") < flops("full")
    # JAX 0.10 runs the kernel again where another memory keeps what it gave.
    newer = jax.__version_info__ >= (0, 12)
    assert flops("offload") == flops("none") if newer else flops("offload") < flops("full")
