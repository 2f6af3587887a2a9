"""Tiles and chunks: exact where a network's reach allows, without seams, and small in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import drawn

from diffusion_jax.models.first_stage import tiling
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.first_stage.video_decoder import VideoDecoder

SIZES = {"tile": 8, "overlap": 5, "margin": 1}


def conv(x, kernel, stride=1, padding=((1, 1), (1, 1))):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=dims
    )


def compiled(function):
    """Compile with little optimisation: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def kernels():
    return (
        jax.random.normal(jax.random.key(0), (3, 3, 2, 4)),
        jax.random.normal(jax.random.key(1), (3, 3, 4, 3)),
    )


def convolutions_down(x):
    """Halve the sides with a reach of one latent pixel."""
    first, _ = kernels()
    return conv(x, first, 2, ((0, 1), (0, 1)))


def convolutions_up(x):
    """Two convolutions, of which the second works on doubled sides: a reach of 1.5 pixels."""
    first, second = kernels()
    return conv(jnp.repeat(jnp.repeat(conv(x, first), 2, 1), 2, 2), second)


@pytest.mark.parametrize("shape", [(2, 19, 8, 2), (1, 23, 30, 2), (1, 5, 21, 2)])
def test_convolutions_are_exact_if_the_margin_covers_their_reach(shape):
    x = jax.random.normal(jax.random.key(2), shape)
    sizes = SIZES | {"margin": 2}
    tiled = jax.jit(lambda x: tiling.tiled_decode(convolutions_up, x, factor=2, **sizes))(x)
    plain = convolutions_up(x)
    np.testing.assert_allclose(tiled, plain, rtol=1e-4, atol=1e-4)
    short = tiling.tiled_decode(convolutions_up, x, factor=2, **SIZES | {"margin": 0})
    assert float(jnp.abs(short - plain).max()) > 0.01

    image = jax.random.normal(jax.random.key(3), (1, 2 * shape[1], 2 * shape[2], 2))
    tiled = tiling.tiled_encode(convolutions_down, image, factor=2, **SIZES)
    np.testing.assert_allclose(tiled, convolutions_down(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [9, 13, 40, 41])
@pytest.mark.parametrize("scale", [1, 4])
def test_weights_sum_to_one_and_change_linearly(size, scale):
    axis = tiling.tile_axis(size, tile=8, overlap=5)
    starts, length = axis
    assert starts[0] == 0 and starts[-1] + length == size
    assert all(8 - (b - a) >= 5 for a, b in zip(starts[:-1], starts[1:], strict=True))
    weights = tiling.blend_weights(axis, overlap=5, margin=1, scale=scale)
    total = np.zeros(size * scale)
    for start, row in zip(starts, weights, strict=True):
        total[start * scale : (start + length) * scale] += row
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
    assert not weights[1:, :scale].any() and not weights[:-1, -scale:].any()
    # No seam: neighbouring pixels of a tile differ by no more than a ramp over three pixels does,
    # or one and a half times that where three tiles meet.
    assert np.abs(np.diff(weights, axis=1)).max() <= 1.5 / (3 * scale) + 1e-6


def test_tiles_that_just_touch_blend_by_a_line():
    weights = tiling.blend_weights(tiling.Axis((0, 4), 8), overlap=4, margin=0)
    expected = [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]
    np.testing.assert_allclose(weights, [expected, expected[::-1]])


def test_tiles_that_disagree_are_blended_without_a_step():
    """Each tile shows the mean of its places, which lie 4 apart: blended, every place its own."""
    x = jnp.broadcast_to(jnp.arange(40.0)[None, None, :, None], (1, 8, 40, 1))
    mean = lambda z: jnp.broadcast_to(z.mean((1, 2, 3), keepdims=True), z.shape)
    blended = tiling.tiled_decode(mean, x, factor=1, tile=8, overlap=4, margin=0)
    np.testing.assert_allclose(blended, jnp.clip(x, 3.5, 35.5), rtol=1e-5)


@pytest.mark.slow
def test_an_autoencoder_in_tiles():
    fields = {"ch": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "num_groups": 2, "resolution": 8}
    module = Autoencoder(**fields)
    z = jax.random.normal(jax.random.key(4), (1, 16, 40, 4))
    params = compiled(module.init)(jax.random.key(5), jnp.ones((1, 8, 8, 3)))
    sizes = {"factor": 2, "tile": 16, "overlap": 8, "margin": 2}

    @compiled
    def run(params, z):
        decode = lambda z: module.apply(params, z, method="decode")
        return tiling.tiled_decode(decode, z, **sizes), decode(z)

    tiled, plain = run(params, z)
    # Close, not equal: GroupNorm and attention see the tile only.
    error = jnp.sqrt(jnp.mean(jnp.square(tiled - plain))) / jnp.std(plain)
    assert 0.001 < error < 0.2


def over_time(x):
    """A convolution over three frames, whose reach is one frame."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    return sum((w * padded[:, i : i + x.shape[1]] for i, w in enumerate((0.2, 1.0, -0.5))), 0.0)


@pytest.mark.parametrize("count", [5, 6, 13, 25])
def test_chunks_of_frames_are_exact_if_the_margin_covers_their_reach(count):
    z = jax.random.normal(jax.random.key(0), (2, count, 3, 2, 1))
    size = {"frames": 6, "overlap": 3}
    ours = tiling.decode_in_clips(over_time, z, **size, margin=1)
    np.testing.assert_allclose(ours, over_time(z), rtol=1e-5, atol=1e-5)
    if count > 6:
        assert (
            float(jnp.abs(tiling.decode_in_clips(over_time, z, **size) - over_time(z)).max()) > 0.1
        )


@pytest.mark.slow
def test_overlapping_chunks_have_smaller_seams_than_a_cut():
    """Against the whole clip: all frames, and the steps from one frame to the next at the seams."""
    module = VideoDecoder(ch=8, ch_mult=(1,), num_res_blocks=1, num_groups=2, attn_type="none")
    z = jnp.cumsum(jax.random.normal(jax.random.key(1), (1, 13, 4, 4, 4)), axis=1)
    params = drawn(jax.eval_shape(module.init, jax.random.key(0), z)["params"])

    @compiled
    def run(params, z):
        decode = lambda z: module.apply({"params": params}, z)
        cut = jnp.concatenate([decode(z[:, :7]), decode(z[:, 7:])], axis=1)
        return decode(z), cut, tiling.decode_in_clips(decode, z, frames=8, overlap=3)

    whole, cut, ours = run(params, z)

    def errors(video):
        difference = np.asarray(video - whole)
        steps = np.abs(np.diff(difference, axis=1)).mean((0, 2, 3, 4))
        return np.sqrt(np.square(difference).mean()), steps.max()

    assert errors(ours)[0] < 0.8 * errors(cut)[0]
    assert errors(ours)[1] < 0.6 * errors(cut)[1]


def test_one_tile_is_passed_through():
    seen = []

    def network(z):
        seen.append(z)
        return z

    z = jnp.ones((2, 8, 5, 1))
    assert tiling.tiled_decode(network, z, factor=1, **SIZES) is z
    assert tiling.tiled_encode(network, z, factor=1, **SIZES) is z
    assert len(seen) == 2 and seen[0] is z


def test_memory_is_that_of_a_tile():
    shapes = []

    def wide(z):
        shapes.append(z.shape)
        return jnp.tanh(conv(z, jnp.ones((3, 3, 1, 64)))) @ jnp.ones((64, 1))

    def temporary(function):
        compiled = jax.jit(function).lower(jnp.ones((1, 64, 64, 1))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tiled = temporary(lambda z: tiling.tiled_decode(wide, z, factor=1, tile=16, overlap=9))
    assert set(shapes) == {(1, 16, 16, 1)} and len(shapes) == 2  # once for the output's shape
    assert tiled < 0.25 * temporary(wide)


@pytest.mark.parametrize("batch", [2, 3, 6, 7])
def test_chunks_keep_the_samples_in_their_order(batch):
    sizes = []

    def function(x):
        sizes.append(x["a"].shape[0])
        return {"sum": x["a"].sum(-1) + x["b"], "square": x["a"] ** 2}

    x = {"a": jnp.arange(batch * 2.0).reshape(batch, 2), "b": 100.0 * jnp.arange(batch)}
    ours = tiling.in_chunks(function, x, chunk_size=3)
    assert max(sizes) == min(batch, 3)
    for key, expected in function(x).items():
        np.testing.assert_array_equal(ours[key], expected)


def test_sizes_that_do_not_fit_are_named():
    z = jnp.ones((1, 16, 16, 1))
    with pytest.raises(ValueError, match="tile = 8, overlap = 4, margin = 2: should be"):
        tiling.tiled_decode(lambda z: z, z, tile=8, overlap=4, margin=2)
    with pytest.raises(ValueError, match="overlap = 8"):
        tiling.tiled_decode(lambda z: z, z, tile=8, overlap=8, margin=2)
    with pytest.raises(ValueError, match="frames = 4, overlap = 4, margin = 0: should be"):
        tiling.decode_in_clips(lambda z: z, z[None], frames=4, overlap=4)
    with pytest.raises(ValueError, match="16 x 15 pixels; both should be multiples of 8"):
        tiling.tiled_encode(lambda x: x, jnp.ones((1, 16, 15, 3)))
    with pytest.raises(ValueError, match="chunk_size = 0"):
        tiling.in_chunks(lambda x: x, z, chunk_size=0)
