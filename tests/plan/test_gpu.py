"""The compiler of NVIDIA's GPUs itself, where jax's plugin for CUDA is installed (`make gpu`)."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.devices.flops import count_flops
from diffusion_jax.devices.mesh import make_mesh, on_mesh
from diffusion_jax.models.layers.attention import attention
from diffusion_jax.plan import find_topology
from diffusion_jax.plan.count import count
from diffusion_jax.plan.floor import by_kind, floor
from diffusion_jax.plan.hlo import parse

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_cache")]
pytest.importorskip("jax_cuda13_plugin")


def compiled_for(name, function, *shapes):
    """Compile for one GPU; shapes are in bfloat16. Returns its text and the arguments."""
    topology = find_topology(name)
    mesh = make_mesh(devices=topology.devices, data=1)
    args = [
        jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))
        for sizes in shapes
    ]
    return jax.jit(on_mesh(mesh, function)).lower(*args).compile().as_text(), args, topology.chip


def convolved(x, kernel):
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=dimensions)
    return jnp.sum(jnp.square(y.astype(jnp.float32)))


def test_convolutions_and_their_gradients_are_cudnn_s_and_counted():
    both = jax.grad(convolved, (0, 1))
    text, args, chip = compiled_for("h100:1", both, (4, 32, 32, 64), (3, 3, 64, 128))
    for kernel in ("convBackwardInput", "convBackwardFilter"):
        assert f"__cudnn${kernel}" in text
    assert count(parse(text)).flops == count_flops(both, *args)
    assert by_kind(floor(parse(text), chip))["convolution"].runs == 3


@pytest.mark.parametrize(("keys", "cudnn"), [(1024, True), (77, True), (1, False)])
@pytest.mark.parametrize("name", ["h100:1", "a100:1"])
def test_attention_trains_with_cudnn_where_it_can(name, keys, cudnn):
    def loss(q, k, v):
        return jnp.sum(jnp.square(attention(q, k, v).astype(jnp.float32)))

    gradient = jax.grad(loss, (0, 1, 2))
    q, k = (2, 1024, 4, 64), (2, keys, 4, 64)
    text, args, _ = compiled_for(name, gradient, q, k, k)
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == cudnn
    products = 7 if cudnn else 6  # cuDNN computes the scores again
    computed = 80 if keys == 77 else keys
    assert count(parse(text)).flops == products * 2 * 2 * 4 * 1024 * computed * 64
