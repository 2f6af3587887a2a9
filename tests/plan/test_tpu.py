"""The compiler of TPUs itself, where libtpu is installed: its programs count as they should."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from diffusion_jax.devices.flops import count_flops
from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.plan import DoesNotFit, find_topology
from diffusion_jax.plan.compiling import _Clock, _compile, _optimal_seconds
from diffusion_jax.plan.count import count
from diffusion_jax.plan.hlo import parse
from diffusion_jax.plan.report import in_full

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_cache")]
pytest.importorskip("libtpu")


def compiled_for(name, function, *shapes):
    """Compile for a slice; shapes are (sizes, spec), bfloat16. Returns it, counts and estimate."""
    topology = find_topology(name)
    mesh = make_mesh(devices=topology.devices, data=1, fsdp=-1)
    args = [
        jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
        for sizes, spec in shapes
    ]
    compiled = _compile(jax.jit(function).lower(*args), topology, _Clock(), 0)
    program = parse(compiled.as_text())
    counts, once = count(program), count(program, loops=False)
    return args, counts, in_full(_optimal_seconds(compiled, once, topology), counts, once)


def block(x, w):
    return jnp.tanh(x @ w), None


def scanned(x, weights):
    return jax.lax.scan(block, x, weights)[0].astype(jnp.float32).sum()


def unrolled(x, weights):
    for w in weights:
        x, _ = block(x, w)
    return x.astype(jnp.float32).sum()


def test_ten_blocks_scanned_count_and_take_as_ten_unrolled():
    shapes = ((4096, 1024), P("fsdp")), ((10, 1024, 1024), P(None, None, "fsdp"))
    found = [compiled_for("v5e:2x2", jax.grad(f, (0, 1)), *shapes) for f in (scanned, unrolled)]
    args = found[0][0]
    assert count_flops(jax.grad(scanned, (0, 1)), *args) == 30 * 2 * 4096 * 1024**2
    for _, counts, _ in found:
        assert counts.flops * 4 == pytest.approx(30 * 2 * 4096 * 1024**2, rel=0.01)
        assert counts.unknown_loops == 0
        # Forward at least, every turn gathers its weights.
        assert counts.collective_bytes["all-gather"] >= 10 * 2 * 1024**2
    assert found[0][2] == pytest.approx(found[1][2], rel=0.25)


def test_a_convolution_and_its_gradients_count_as_the_closed_form():
    def loss(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y.astype(jnp.float32) ** 2)

    shapes = ((64, 32, 32, 256), P()), ((3, 3, 256, 256), P())
    gradients = jax.grad(loss, (0, 1))
    args, counts, seconds = compiled_for("v5e:1x1", gradients, *shapes)
    closed = 3 * 2 * 64 * 256 * 256 * (3 * 32 - 2) ** 2
    assert count_flops(gradients, *args) == closed
    assert counts.flops == pytest.approx(closed, rel=0.02)
    # Not faster than the chip, and not many times slower.
    assert 1 < seconds * 197e12 / closed < 4


def test_attention_counts_as_its_two_products():
    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v)

    shapes = [((4, 1024, 8, 64), P())] * 3
    _, counts, _ = compiled_for("v5p:1x1x1", attend, *shapes)
    assert counts.flops == pytest.approx(2 * 2 * 4 * 8 * 1024 * 1024 * 64, rel=0.02)


def test_what_the_compiler_finds_no_room_for_is_told_in_numbers():
    with pytest.raises(DoesNotFit, match="GiB per device and v5e:1x1 has 15.75 GiB") as caught:
        compiled_for("v5e:1x1", lambda x: (x + 1, x * 2), ((2**33,), P()))
    assert caught.value.needed > 3 * 2**34 * 0.99
    assert caught.value.available == find_topology("v5e:1x1").memory


@pytest.mark.parametrize("name", ["v3:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1"])
def test_the_memory_of_a_chip_is_what_its_compiler_says(name):
    with pytest.raises(DoesNotFit) as caught:
        compiled_for(name, lambda x: (x + 1, x * 2), ((2**37,), P()))
    memory = find_topology(name).memory
    assert memory is not None and abs(caught.value.available - memory) < 2**20
