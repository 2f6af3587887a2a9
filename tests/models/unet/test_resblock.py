"""The residual block: its start, its two ways to take the embedding, and resampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.devices.flops import count_flops
from diffusion_jax.models.layers.basic import average_pool, rematerialised, upsample_nearest
from diffusion_jax.models.layers.norm import group_norm
from diffusion_jax.models.unet.resblock import ResBlock, VideoResBlock

X = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
EMB = jax.random.normal(jax.random.key(1), (2, 6))


def drawn(module):
    """Parameters without zeros."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, EMB)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    values = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def formula(params, x, emb, scale_shift, resample):
    def norm(name, h):
        gain, bias = (
            jnp.broadcast_to(params[name][leaf], (h.shape[0], h.shape[-1]))
            for leaf in ("scale", "bias")
        )
        return group_norm(h, gain, bias, num_groups=2, epsilon=1e-5)

    def convolve(name, h):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            h, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return h + params[name]["bias"][None, None, None]

    h = convolve("in_layers_2", resample(jax.nn.silu(norm("in_layers_0", x))))
    emb = jax.nn.silu(emb) @ params["emb_layers_1"]["kernel"] + params["emb_layers_1"]["bias"][None]
    emb = emb[:, None, None]
    if scale_shift:
        half = emb.shape[-1] // 2
        h = norm("out_layers_0", h) * (1 + emb[..., :half]) + emb[..., half:]
    else:
        h = norm("out_layers_0", h + emb)
    h = convolve("out_layers_3", jax.nn.silu(h))
    x = resample(x)
    return h + (convolve("skip_connection", x) if "skip_connection" in params else x)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("change", [None, "up", "down"])
def test_block_is_the_formula(scale_shift, change):
    channels = 8 if change else 12
    kwargs = {change: True} if change else {}
    module = ResBlock(channels, use_scale_shift_norm=scale_shift, num_groups=2, **kwargs)
    params = drawn(module)
    assert ("skip_connection" in params) == (channels != 8)
    resample = {"up": upsample_nearest, "down": average_pool, None: lambda h: h}[change]
    ours = module.apply({"params": params}, X, EMB)
    side = {"up": 8, "down": 2, None: 4}[change]
    assert ours.shape == (2, side, side, channels)
    np.testing.assert_allclose(
        ours, formula(params, X, EMB, scale_shift, resample), rtol=1e-4, atol=1e-5
    )


def test_a_new_block_is_the_identity():
    output, _ = ResBlock(8, num_groups=2).init_with_output(jax.random.key(0), X, EMB)
    np.testing.assert_array_equal(output, X)


def test_dropout_thins_the_second_convolution():
    module = ResBlock(8, dropout=0.5, num_groups=2)
    params = drawn(module)
    one, two = (
        module.apply({"params": params}, X, EMB, rngs={"dropout": jax.random.key(i)})
        for i in (0, 1)
    )
    assert not jnp.allclose(one, two)


def test_one_channel_per_group_hides_an_added_embedding():
    """Why 32 channels in 32 groups need use_scale_shift_norm or fewer groups to see t."""
    blind, seeing = ResBlock(8, num_groups=8), ResBlock(8, num_groups=2)
    for module, differs in ((blind, False), (seeing, True)):
        params = drawn(module)
        one, two = (module.apply({"params": params}, X, emb) for emb in (EMB, 3.0 * EMB))
        assert jnp.allclose(one, two, atol=1e-4) != differs


@pytest.mark.parametrize("remat", ["none", "full", "dots", "offload"])
def test_remat_keeps_convolutions_or_not_and_changes_no_gradient(remat):
    x, emb = jax.random.normal(jax.random.key(0), (1, 6, 6, 32)), jnp.ones((1, 16))
    plain, block = ResBlock(32), rematerialised(ResBlock, remat)(32)
    params = jax.eval_shape(plain.init, jax.random.key(1), x, emb)
    params = jax.tree.map(
        lambda leaf: jnp.linspace(-0.1, 0.1, leaf.size).reshape(leaf.shape), params
    )
    loss = lambda module, params, x: jnp.sum(jnp.sin(module.apply(params, x, emb)))
    gradients = [jax.grad(functools.partial(loss, module), (0, 1)) for module in (plain, block)]
    costs = [count_flops(gradient, params, x) for gradient in gradients]
    assert (costs[1] > costs[0]) == (remat == "full")
    theirs, ours = (jax.jit(gradient)(params, x) for gradient in gradients)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_without_an_embedding_the_first_convolution_goes_on_as_it_is():
    module = ResBlock(8, num_groups=2)
    params = drawn(module)
    silent = params | {"emb_layers_1": jax.tree.map(jnp.zeros_like, params["emb_layers_1"])}
    without = {name: leaf for name, leaf in params.items() if name != "emb_layers_1"}
    ours = module.apply({"params": without}, X)
    np.testing.assert_allclose(ours, module.apply({"params": silent}, X, EMB), rtol=1e-5)


def test_a_video_block_blends_each_frame_with_the_block_over_time():
    """One clip of two frames: the block over time is computed by itself, in three dimensions."""
    module = VideoResBlock(
        8, num_groups=2, video_kernel_size=(3, 1, 1), merge_strategy="learned_with_images"
    )
    emb, indicator = EMB[None], jnp.array([[0, 1]])
    shapes = jax.eval_shape(module.init, jax.random.key(0), X, emb, indicator)["params"]
    params = jax.tree.map(
        lambda leaf: 0.1 + 0.01 * jnp.arange(leaf.size).reshape(leaf.shape), shapes
    )
    ours = module.apply({"params": params}, X, emb, indicator)
    spatial = {k: v for k, v in params.items() if not k.startswith("time_")}
    frames = ResBlock(8, num_groups=2).apply({"params": spatial}, X, EMB)
    np.testing.assert_array_equal(ours[1], frames[1])
    over_time = ResBlock(8, num_groups=2, kernel_size=(3, 1, 1))
    moving = over_time.apply({"params": params["time_stack"]}, frames[None], emb)[0]
    alpha = 1 / (1 + np.exp(-0.1))
    wanted = alpha * frames[0] + (1 - alpha) * moving[0]
    np.testing.assert_allclose(ours[0], wanted, rtol=1e-4)
