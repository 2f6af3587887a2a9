"""A first stage in a config: sizes, memory limits that do not change the numbers, mistakes."""

import jax
import numpy as np
import pytest

from diffusion_jax.build.binding import ConfigError
from diffusion_jax.build.first_stage import build_first_stage

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
    params = stage.init(jax.random.key(0))
    image = jax.random.uniform(jax.random.key(1), (5, *SHAPE), minval=-1.0)
    return params, image, stage.moments(params, image)


def test_sizes_follow_from_the_levels():
    stage = build()
    assert (stage.latent_shape, stage.factor, stage.scale_factor) == ((8, 8, 4), 2, 0.2)


def test_few_samples_at_a_time_give_the_same_numbers(numbers):
    params, image, moments = numbers
    few = build(samples_at_a_time=2)
    np.testing.assert_allclose(few.moments(params, image), moments, atol=1e-5)
    z = moments[..., :4]
    plain = build().decode(params, z)
    assert plain.shape == image.shape
    np.testing.assert_allclose(few.decode(params, z), plain, atol=1e-5)


def test_large_latents_are_decoded_in_tiles_and_small_ones_whole(numbers):
    params, _, moments = numbers
    tiled = build(tile=16)
    np.testing.assert_allclose(
        tiled.decode(params, moments[..., :4]), build().decode(params, moments[..., :4]), atol=1e-6
    )
    z = jax.random.normal(jax.random.key(2), (1, 24, 40, 4))
    shapes = []
    stage = tiled._replace(module=Spy(shapes))
    assert stage.decode(params, z).shape == (1, 48, 80, 3)
    assert {shape[1:] for shape in shapes} == {(16, 16, 4)}


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
        (dict(scale_factor=0.0), r"config\.first_stage\.scale_factor = 0\.0 should be at least"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
