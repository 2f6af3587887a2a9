"""A first stage in a config: sizes, memory limits that do not change the numbers, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import drawn

from diffusion_jax.devices.mesh import make_mesh, on_mesh
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.first_stage.frozen import build_first_stage

SECTION = dict(
    name="autoencoder_kl",
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    num_groups=4,
    attn_type="none",
    scale_factor=0.2,
)
SHAPE = (16, 16, 3)


def build(**options):
    return build_first_stage(SECTION | options, SHAPE)


@pytest.fixture(scope="module")
def numbers():
    stage = build()
    params = jax.jit(stage.init)(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (5, *SHAPE), minval=-1.0)
    return params, image, jax.jit(stage.moments)(params, image)


def test_sizes_follow_from_the_levels():
    stage = build()
    assert (stage.latent_shape, stage.factor, stage.options.scale_factor) == ((8, 8, 4), 2, 0.2)


def test_few_samples_at_a_time_give_the_same_numbers(numbers):
    params, image, moments = numbers
    few = build(samples_at_a_time=2)
    np.testing.assert_allclose(jax.jit(few.moments)(params, image), moments, atol=1e-5)
    z = moments[..., :4]
    plain = jax.jit(build().decode)(params, z)
    assert plain.shape == image.shape
    np.testing.assert_allclose(jax.jit(few.decode)(params, z), plain, atol=1e-5)


@pytest.mark.parametrize(("data", "chunks"), [(1, 8), (4, 2)])
def test_the_devices_of_a_mesh_encode_at_the_same_time(data, chunks):
    """One image at a time on each device: eight images are two turns of four devices."""
    mesh, stage = make_mesh(data=data, devices=jax.devices()[:data]), build(samples_at_a_time=1)
    params = jax.eval_shape(stage.init, jax.random.key(0))
    program = jax.make_jaxpr(on_mesh(mesh, stage.moments))(params, jnp.zeros((8, *SHAPE)))
    assert f"length={chunks}" in str(program)


def test_large_latents_are_decoded_in_tiles_and_small_ones_whole(numbers):
    params, _, moments = numbers
    tiled = build(tile=16)
    found, whole = (jax.jit(s.decode)(params, moments[..., :4]) for s in (tiled, build()))
    np.testing.assert_allclose(found, whole, atol=1e-6)
    z = jax.random.normal(jax.random.key(2), (1, 24, 40, 4))
    shapes = []
    stage = tiled._replace(module=Spy(shapes))
    assert stage.decode(params, z).shape == (1, 48, 80, 3)
    assert {shape[1:] for shape in shapes} == {(16, 16, 4)}


def test_large_images_are_encoded_in_tiles_and_small_ones_whole(numbers):
    params, image, moments = numbers
    np.testing.assert_allclose(build(tile=16).moments(params, image), moments, atol=1e-6)
    plain = build()
    large = jax.random.uniform(jax.random.key(2), (1, 48, 80, 3), minval=-1.0)
    seen = []

    class Encoder:
        def apply(self, variables, x, method):
            seen.append(x.shape)
            return plain.module.apply(variables, x, method=method)

    found = build(tile=16)._replace(module=Encoder()).moments(params, large)
    assert {shape[1:] for shape in seen} == {(32, 32, 3)}
    whole = plain.moments(params, large)
    assert found.shape == whole.shape == (1, 24, 40, 8)
    # Close, not equal: GroupNorm and attention see the tile only.
    error = np.sqrt(np.mean(np.square(found - whole))) / np.std(whole)
    assert 1e-6 < error < 0.5


VQ = dict(name="autoencoder_vq", embed_dim=3, z_channels=3, num_codes=16, scale_factor=1.0)


@pytest.fixture(scope="module")
def quantised():
    stage = build(**VQ)
    params = stage.init(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (2, *SHAPE), minval=-1.0)
    return stage, params, stage.moments(params, image)


def test_latents_of_a_codebook_are_those_before_it_and_no_matter_of_chance(quantised):
    stage, _, moments = quantised
    assert (stage.latent_shape, moments.shape) == ((8, 8, 3), (2, 8, 8, 3))
    keys = jax.random.split(jax.random.key(2), 2)
    np.testing.assert_array_equal(stage.draw(moments, keys), moments)
    assert len(np.unique(np.asarray(moments).reshape(-1, 3), axis=0)) > 100  # no codes yet


def test_decoding_quantises_unless_told_not_to(quantised):
    stage, params, moments = quantised
    codes = np.asarray(params["quantize"]["embedding"])
    squares = np.square(np.asarray(moments)[..., None, :] - codes).sum(-1)
    nearest = jnp.asarray(codes[squares.argmin(-1)])
    networks = {name: own for name, own in params.items() if name != "quantize"}
    decode = lambda z: stage.module.apply({"params": networks}, z, method="decode")
    np.testing.assert_allclose(stage.decode(params, moments), decode(nearest), atol=1e-6)
    plain = build(**VQ, quantize=False)
    np.testing.assert_allclose(plain.decode(params, moments), decode(moments), atol=1e-6)
    assert np.abs(decode(nearest) - decode(moments)).max() > 1e-2
    few = build(**VQ, samples_at_a_time=1)
    np.testing.assert_allclose(few.decode(params, moments), decode(nearest), atol=1e-5)


VIDEO = dict(name="autoencoder_video", z_channels=4)


@pytest.mark.slow
def test_videos_are_encoded_by_frame_and_decoded_as_clips():
    stage = build(**VIDEO)
    params = drawn(jax.eval_shape(stage.init, jax.random.key(0)))
    video = jax.random.uniform(jax.random.key(1), (2, 5, *SHAPE), minval=-1.0)
    keys = lambda: jax.random.split(jax.random.key(2), 2)

    @jax.jit
    def run(params, video):
        moments = stage.moments(params, video)
        z = moments[..., :4]
        decode = lambda z: stage.module.apply({"params": params}, z, method="decode")
        few = build(**VIDEO, samples_at_a_time=1, tile=16)
        halves = build(**VIDEO, frames_at_a_time=4)
        return {
            "moments": (moments, jnp.stack([stage.moments(params, clip) for clip in video])),
            "clips": (stage.decode(params, z), decode(z)),
            "few": (few.decode(params, z), decode(z)),
            "image": (
                stage.decode(params, z[:, 0]),
                stage.module.apply(
                    {"params": params},
                    z[:, :1],
                    method="decode",
                    image_only_indicator=jnp.ones((2, 1)),
                )[:, 0],
            ),
            "chunks": (halves.decode(params, z), decode(z)),
            "draws": (
                stage.encode(params, video, keys())[1:],
                stage.encode(params, video[1:], keys()[1:]),
            ),
        }

    found = run(params, video)
    error = lambda name: float(jnp.abs(found[name][0] - found[name][1]).max())
    assert found["moments"][0].shape == (2, 5, 8, 8, 8)
    assert {name for name in found if error(name) > 1e-4} == {"chunks"}
    assert found["chunks"][0].shape == video.shape


def test_a_decoder_of_images_decodes_videos_by_frame(numbers):
    params, _, moments = numbers
    z = moments[:4, ..., :4]
    clips = jax.jit(build().decode)(params, z.reshape(2, 2, *z.shape[1:]))
    np.testing.assert_allclose(
        clips.reshape(4, *SHAPE), jax.jit(build().decode)(params, z), atol=1e-6
    )


class Spy:
    """Decodes to zeros and remembers the shapes of what it saw."""

    def __init__(self, shapes):
        self.shapes = shapes

    def apply(self, variables, z, method):
        self.shapes.append(z.shape)
        return jax.numpy.zeros((z.shape[0], 2 * z.shape[1], 2 * z.shape[2], 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="autoencoder"), r"config\.first_stage\.name = 'autoencoder' is unknown"),
        (dict(samples_at_a_time=0), r"config\.first_stage\.samples_at_a_time = 0 should be at"),
        (dict(tile=4), r"config\.first_stage\.tile = 4 should be at least 16"),
        (dict(chs=3), r"config\.first_stage\.chs = 3 is not an option; did you mean 'ch'"),
        (dict(ch_mult=(1, 2, 4, 4, 4, 4)), r"image_size = \(16, 16\) should be a multiple of 32"),
        (dict(double_z=False), r"double_z = False should be True: .*'autoencoder_kl' has mean"),
        (VQ | dict(double_z=True), r"double_z = True should be False: .*'autoencoder_vq' has one"),
        (VQ | dict(num_codes=0), r"config\.first_stage\.num_codes = 0 should be at least 1"),
        (VIDEO | dict(overlap=0), r"config\.first_stage\.overlap = 0 should be at least 1"),
        (VIDEO | dict(frames_at_a_time=3), r"frames_at_a_time = 3 should be at least 4"),
        (dict(num_codes=4), r"config\.first_stage\.num_codes = 4 is not an option"),
        (dict(scale_factor=0.0), r"config\.first_stage\.scale_factor = 0\.0 should be above 0"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
