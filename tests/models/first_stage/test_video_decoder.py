"""The decoder of videos against the released parameter list, the image decoder and formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import autoencoder_fixtures as fixtures
from support.trees import drawn

from diffusion_jax.convert.weights.names import file_tensors
from diffusion_jax.models.first_stage import VideoAutoencoder, VideoDecoder
from diffusion_jax.models.first_stage.autoencoder import Decoder
from diffusion_jax.models.first_stage.blocks import ResnetBlock
from diffusion_jax.models.first_stage.video_decoder import VideoAttnBlock, VideoResBlock

TINY = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4, "resolution": 8}
RELEASED = {"video_kernel_size": (3, 1, 1)}


def abstract_params(module, *inputs):
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def merged(new, old):
    """Leaves of a tree, taken from another one where it has them."""
    if not isinstance(new, dict):
        return old
    return {name: merged(new[name], old[name]) if name in old else new[name] for name in new}


def compiled(function):
    """Compile with little optimisation: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def test_names_and_shapes_are_the_released_ones():
    z = jnp.ones((1, 2, 4, 4, 4))
    tree = {"decoder": abstract_params(VideoDecoder(**RELEASED), z)}
    found = {t.name.removeprefix("decoder."): t.shape for t in file_tensors(tree, "vae_ldm")}
    assert found == fixtures.read_names()["vae_svd_videodecoder"]
    video = jnp.ones((1, 2, 16, 16, 3))
    tree = abstract_params(VideoAutoencoder(**RELEASED), video)
    assert set(tree) == {"encoder", "decoder"}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree[name])) for name in tree}
    assert sizes == {"encoder": 34_163_592, "decoder": 63_579_183}


@pytest.mark.slow
@pytest.mark.parametrize("time_mode", ["all", "conv-only", "attn-only"])
def test_images_are_decoded_as_by_the_image_decoder(time_mode):
    """The frames of one clip are images and those of the other see each other."""
    module, image = VideoDecoder(**TINY, time_mode=time_mode), Decoder(**TINY)
    z = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 4))
    params = drawn(abstract_params(module, z))
    own = {name: params[name] for name in abstract_params(image, z[0])}

    @compiled
    def run(params, own, z):
        indicator = jnp.asarray([[1, 1, 1], [0, 0, 0]])
        both = module.apply({"params": params}, z, image_only_indicator=indicator)
        return both, jax.vmap(lambda z: image.apply({"params": own}, z))(z)

    both, alone = run(params, own, z)
    assert both.shape == (2, 3, 8, 8, 3)
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-5, atol=1e-5)
    assert jnp.abs(both[1] - alone[1]).max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"time_mode": "all", "merge_strategy": "fixed", "alpha": 1.0}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_new_decoder_is_the_image_decoder_until_it_is_trained(options):
    """Bit for bit, with the weights of any image decoder."""
    module, image = VideoDecoder(**TINY, **options), Decoder(**TINY)
    z = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 4))
    own = drawn(abstract_params(image, z[0]))
    made = compiled(module.init)(jax.random.key(0), z)["params"]
    both = compiled(lambda p: module.apply({"params": p}, z))(merged(made, own))
    alone = compiled(lambda p: image.apply({"params": p}, z.reshape(6, 4, 4, 4)))(own)
    np.testing.assert_array_equal(both.reshape(alone.shape), alone)


def group_norm(x, params, epsilon, groups=4):
    """Normalise [b ... c] over all but the batch."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    normalised = ((grouped - mean) / np.sqrt(var + epsilon)).reshape(x.shape)
    return normalised * params["scale"] + params["bias"]


def silu(h):
    return h / (1.0 + np.exp(-h))


def sigmoid(h):
    return 1.0 / (1.0 + np.exp(-h))


def dense(params, h):
    return h @ params["kernel"].reshape(params["kernel"].shape[-2:]) + params.get("bias", 0.0)


def test_a_residual_block_weighs_the_block_over_time_by_alpha():
    x = np.random.RandomState(0).standard_normal((6, 2, 3, 8)).astype(np.float32)
    indicator = np.zeros((2, 3))
    block = VideoResBlock(12, video_kernel_size=(3, 1, 1), num_groups=4)
    params = drawn(abstract_params(block, jnp.asarray(x), jnp.asarray(indicator)))
    spatial = {k: v for k, v in params.items() if not k.startswith("time_")}
    frames = ResnetBlock(12, num_groups=4).apply({"params": spatial}, jnp.asarray(x))
    frames = np.asarray(frames).reshape(2, 3, 2, 3, 12)
    own = jax.tree.map(np.asarray, params["time_stack"])

    def over_time(layer, h):
        padded = np.pad(h, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        taps = (padded[:, i : i + 3] @ layer["kernel"][i, 0, 0] for i in range(3))
        return sum(taps) + layer["bias"]

    h = over_time(own["in_layers_2"], silu(group_norm(frames, own["in_layers_0"], 1e-5)))
    h = over_time(own["out_layers_3"], silu(group_norm(h, own["out_layers_0"], 1e-5)))
    alpha = sigmoid(np.asarray(params["time_mixer"]["mix_factor"]))
    expected = alpha * (frames + h) + (1.0 - alpha) * frames
    ours = block.apply({"params": params}, jnp.asarray(x), jnp.asarray(indicator))
    np.testing.assert_allclose(ours.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def layer_norm(params, h):
    centred = h - h.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * params["scale"] + params["bias"]


def attend(q, k, v):
    scores = np.exp(np.einsum("blc,bmc->blm", q, k) / np.sqrt(q.shape[-1]))
    return np.einsum("blm,bmc->blc", scores / scores.sum(-1, keepdims=True), v)


def feed_forward(params, h):
    value, gate = np.split(dense(params["net_0"]["proj"], h), 2, axis=-1)
    return dense(params["net_2"], np.asarray(value * jax.nn.gelu(gate, approximate=False)))


def test_attention_weighs_the_transformer_over_time_by_one_minus_alpha():
    x = np.random.RandomState(1).standard_normal((6, 2, 2, 8)).astype(np.float32)
    block = VideoAttnBlock(num_groups=4)
    indicator = jnp.zeros((2, 3))
    tree = drawn(abstract_params(block, jnp.asarray(x), indicator))
    params = jax.tree.map(np.asarray, tree)
    h = group_norm(x, params["norm"], 1e-6).reshape(6, 4, 8)
    frames = attend(*(dense(params[name], h) for name in "qkv"))
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    angles = np.arange(3)[:, None] * frequencies
    index = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    index = dense(params["video_time_embed_2"], silu(dense(params["video_time_embed_0"], index)))
    moving = frames.reshape(2, 3, 4, 8).transpose(0, 2, 1, 3).reshape(8, 3, 8) + index
    own = params["time_mix_block"]
    moving = feed_forward(own["ff_in"], layer_norm(own["norm_in"], moving)) + moving
    for norm, name in (("norm1", "attn1"), ("norm2", "attn2")):
        q, k, v = (
            dense(own[name][p], layer_norm(own[norm], moving)) for p in ("to_q", "to_k", "to_v")
        )
        moving = dense(own[name]["to_out_0"], attend(q, k, v)) + moving
    moving = feed_forward(own["ff"], layer_norm(own["norm3"], moving)) + moving
    moving = moving.reshape(2, 4, 3, 8).transpose(0, 2, 1, 3).reshape(6, 4, 8)
    alpha = sigmoid(params["time_mixer"]["mix_factor"])
    mixed = alpha * frames + (1.0 - alpha) * moving
    expected = x + dense(params["proj_out"], mixed).reshape(x.shape)
    ours = block.apply({"params": tree}, jnp.asarray(x), indicator)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_reads_images_and_clips():
    module = VideoAutoencoder(**TINY, use_quant_conv=True)
    video = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 3))
    params = drawn(abstract_params(module, video))

    @compiled
    def run(params, video):
        encode = lambda x: module.apply({"params": params}, x, method="encode")
        return encode(video), encode(video[1])

    clips, images = run(params, video)
    assert clips.shape == (2, 3, 4, 4, 8)
    np.testing.assert_allclose(clips[1], images, rtol=1e-5, atol=1e-5)


BAD = {
    "time_mode = 'some' is unknown; choose from all, conv-only, attn-only": {"time_mode": "some"},
    "merge_strategy = 'mean' is unknown; choose from fixed, learned": {"merge_strategy": "mean"},
    "video_kernel_size = 2 should be an odd number": {"video_kernel_size": 2},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    with pytest.raises(ValueError) as error:
        abstract_params(VideoDecoder(**TINY, **BAD[message]), jnp.ones((1, 2, 4, 4, 4)))
    assert message in str(error.value)


def test_inputs_that_do_not_fit_are_named():
    module = VideoDecoder(**TINY)
    with pytest.raises(ValueError, match="should have the axes b t h w c"):
        abstract_params(module, jnp.ones((2, 4, 4, 4)))
    with pytest.raises(ValueError, match=r"image_only_indicator has shape \(2, 2\), which should"):
        init = lambda z: module.init(jax.random.key(0), z, image_only_indicator=jnp.ones((2, 2)))
        jax.eval_shape(init, jnp.ones((2, 3, 4, 4, 4)))
