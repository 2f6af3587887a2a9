"""FLOPs counted from a jaxpr, against numbers worked out by hand and a published one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType

from diffusion_jax.devices.flops import count_flops, kernel_flops
from diffusion_jax.models.unet.unet import UNet


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_matrix_product_takes_two_a_multiply_add():
    assert count_flops(jnp.matmul, shaped(5, 3), shaped(3, 7)) == 2 * 5 * 3 * 7
    attention_logits = lambda q, k: jnp.einsum("blnd,bmnd->bnlm", q, k)
    assert count_flops(attention_logits, shaped(2, 6, 3, 8), shaped(2, 5, 3, 8)) == (
        2 * (2 * 3) * 6 * 5 * 8
    )


def test_the_gradient_of_a_dense_layer_costs_two_forward_passes():
    loss = lambda w, x: jnp.sum(jnp.sin(jnp.sin(x) @ w))
    forward = 2 * 4 * 16 * 32
    arguments = shaped(16, 32), shaped(4, 16)
    assert count_flops(loss, *arguments) == forward
    assert count_flops(jax.grad(loss), *arguments) == 2 * forward  # of the kernel alone
    assert count_flops(jax.grad(loss, (0, 1)), *arguments) == 3 * forward


def convolution(x, w, stride=1, pad=0, groups=1, dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        [(pad, pad)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def loop_count(size, kernel, stride, pad, dilation):
    """Products along one axis with elements that exist, one by one."""
    out = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    return sum(
        0 <= o * stride + k * dilation - pad < size for o in range(out) for k in range(kernel)
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"pad": 1}, {"stride": 2, "pad": 1}, {"groups": 4}, {"dilation": 2, "pad": 2}],
    ids=str,
)
def test_convolutions_and_both_of_their_gradients(options):
    groups = options["groups"] if "groups" in options else 1
    x, w = shaped(3, 9, 9, 8), shaped(3, 3, 8 // groups, 12)
    rest = {"stride": 1, "pad": 0, "dilation": 1} | options
    taps = loop_count(9, 3, rest["stride"], rest["pad"], rest["dilation"]) ** 2
    forward = 2 * 3 * taps * (8 // groups) * 12
    apply = lambda x, w: convolution(x, w, **options)
    assert count_flops(apply, x, w) == forward
    loss = lambda x, w: jnp.sum(jnp.sin(apply(x, w)))
    assert count_flops(jax.grad(loss, 0), x, w) == 2 * forward
    assert count_flops(jax.grad(loss, 1), x, w) == 2 * forward
    assert count_flops(jax.grad(loss, (0, 1)), x, w) == 3 * forward


def test_without_padding_the_count_is_the_textbook_formula():
    # 2 h' w' k k c c', as in every table of FLOPs
    assert count_flops(convolution, shaped(1, 10, 10, 8), shaped(3, 3, 8, 16)) == (
        2 * 8 * 8 * 3 * 3 * 8 * 16
    )


def test_loops_and_conditions():
    step = lambda x: x @ jnp.ones((8, 8))
    once = 2 * 8**3
    x = shaped(8, 8)
    scanned = lambda x: jax.lax.scan(lambda c, _: (step(c), None), x, length=5)[0]
    assert count_flops(scanned, x) == 5 * once
    nested = lambda x: jax.lax.scan(lambda c, _: (scanned(c), None), x, length=3)[0]
    assert count_flops(jax.jit(nested), x) == 15 * once
    # How long a while loop runs is not in the program.
    unknown = lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 1, step, x)
    assert count_flops(unknown, x) == once
    chosen = lambda x: jax.lax.cond(x[0, 0] > 0, scanned, step, x)
    assert count_flops(chosen, x) == 5 * once


def test_recomputation_counts_where_it_is_in_the_program():
    layer = lambda w, x: jnp.sin(jnp.sin(x) @ w) @ w
    loss = lambda w, x, layer=layer: jnp.sum(layer(w, layer(w, x)) ** 2)
    w, x = shaped(16, 16), shaped(4, 16)
    forward = 4 * 2 * 4 * 16 * 16
    plain = count_flops(jax.grad(loss, (0, 1)), w, x)
    assert plain == 3 * forward
    again = lambda w, x: loss(w, x, jax.checkpoint(layer))
    # The last product of each layer is not needed again.
    assert count_flops(jax.grad(again, (0, 1)), w, x) == 3 * forward + forward // 2


def test_shard_map_counts_every_device_that_splits_the_work():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(
        lambda x: x @ jnp.ones((8, 8)), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    assert count_flops(split, shaped(16, 8)) == 2 * 16 * 8 * 8


def test_a_kernel_counts_at_every_point_of_its_grid():
    def product(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] @ y_ref[...]

    tiled = pl.pallas_call(
        product,
        grid=(2, 4),
        in_specs=[
            pl.BlockSpec((8, 32), lambda i, j: (i, 0)),
            pl.BlockSpec((32, 8), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
        out_shape=shaped(16, 32),
        interpret=True,
    )
    assert count_flops(tiled, shaped(16, 32), shaped(32, 32)) == 2 * 16 * 32 * 32
    within = jax.make_jaxpr(
        lambda x, y: jax.lax.scan(lambda z, _: (tiled(z, y) @ y, None), x, length=3)
    )
    kernels = kernel_flops(within(shaped(16, 32), shaped(32, 32)))
    assert kernels == 3 * 2 * 16 * 32 * 32  # and not the product beside each


def test_custom_derivatives_count_once():
    @jax.custom_vjp
    def double(x):
        return x @ jnp.ones((8, 8))

    double.defvjp(lambda x: (double(x), None), lambda _, g: (g @ jnp.ones((8, 8)),))
    assert count_flops(double, shaped(8, 8)) == 2 * 8**3
    assert count_flops(jax.grad(lambda x: double(x).sum()), shaped(8, 8)) == 4 * 8**3


def test_sdxl_takes_6_761_teraflops_a_sample():
    """Published tables count products with the padding too: 0.5 % more."""
    sdxl = UNet(
        4,
        model_channels=320,
        channel_mult=(1, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(2, 4),
        transformer_depth=(1, 2, 10),
        num_head_channels=64,
        use_spatial_transformer=True,
        use_linear_in_transformer=True,
        context_dim=2048,
        num_classes="sequential",
        adm_in_channels=2816,
        scan=True,
    )
    inputs = shaped(2, 128, 128, 4), shaped(2), shaped(2, 77, 2048), shaped(2, 2816)
    params = jax.eval_shape(sdxl.init, jax.random.key(0), *inputs)
    assert count_flops(sdxl.apply, params, *inputs) / 2 == pytest.approx(6.761e12, rel=0.01)


def test_a_network_counts_like_its_layers():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), padding="VALID")(x)
            return nn.Dense(5)(x.reshape(x.shape[0], -1))

    x = np.zeros((2, 6, 6, 3), np.float32)
    params = jax.eval_shape(Net().init, jax.random.key(0), x)
    assert count_flops(Net().apply, params, x) == 2 * (2 * 16 * 9 * 3 * 4 + 2 * 64 * 5)
