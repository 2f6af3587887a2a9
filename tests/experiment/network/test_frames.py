"""The conditioning frame of a clip, and its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.network.frames import (
    FRAME,
    NOISE_LEVEL,
    NOISED_FRAME,
    add_frame,
    alternating,
    with_frames,
)

COUNT = 4000


@pytest.mark.parametrize(
    "config, message",
    [
        (
            "sv3d.py:p_tiny",
            "config.conditioning.embedders.polars_rad.frames = 4 should be config.data.batches."
            "num_frames = 5: it reads numbers of each frame",
        ),
        (
            "sv4d.py:tiny",
            "config.data.batches.num_frames = 5 should be 4, because config.conditioning.embedders."
            "clip.frames = 2 times are seen from 2 views",
        ),
    ],
)
def test_embedders_of_clips_of_another_length_are_one_sentence(config, message):
    config = load_config(f"configs/{config}", ["--config.data.batches.num_frames=5"])
    with pytest.raises(ConfigError) as error:
        make_experiment(config)
    assert str(error.value) == message


def some_keys(start=0, end=COUNT):
    return jax.random.split(jax.random.key(0), COUNT)[start:end]


def test_a_clip_has_its_frames_first():
    assert with_frames(3, (4, 4, 1)) == (3, 4, 4, 1) and with_frames(None, (4, 4, 1)) == (4, 4, 1)


def test_the_noise_of_a_frame_is_drawn_for_each_sample():
    """ln(sigma) ~ N(-3, 0.5^2), and the noise has that standard deviation in every sample."""
    clips = jnp.ones((COUNT, 2, 4, 4, 3))
    found = add_frame({"image": clips}, some_keys(), (-3.0, 0.5))
    assert found[NOISE_LEVEL].shape == (COUNT, 1)
    np.testing.assert_array_equal(found[FRAME], clips[:, 0])
    log_sigma = np.log(found[NOISE_LEVEL][:, 0])
    np.testing.assert_allclose([log_sigma.mean(), log_sigma.std()], [-3.0, 0.5], atol=0.03)
    drawn = (found[NOISED_FRAME] - 1.0).reshape(COUNT, -1) / found[NOISE_LEVEL]
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [0.0, 1.0], atol=0.02)
    assert abs(np.corrcoef(np.asarray(drawn).std(1), log_sigma)[0, 1]) < 0.06


def test_sample_i_depends_on_its_own_key_and_a_given_level_is_kept():
    clips = jnp.zeros((4, 2, 4, 4, 3))
    whole = add_frame({"image": clips}, some_keys(0, 4), (-3.0, 0.5))
    part = add_frame({"image": clips[2:]}, some_keys(2, 4), (-3.0, 0.5))
    np.testing.assert_array_equal(whole[NOISED_FRAME][2:], part[NOISED_FRAME])
    level = {NOISE_LEVEL: jnp.array([[0.0], [2.0]]), FRAME: jnp.ones((2, 4, 4, 3))}
    given = add_frame(level, some_keys(0, 2), (-3.0, 0.5))
    np.testing.assert_array_equal(given[NOISED_FRAME][0], 1.0)
    assert 1.0 < (given[NOISED_FRAME][1] - 1.0).std() < 3.0


def test_even_steps_see_the_times_in_reverse():
    """Two times of three views: the views of a time stay together and in order."""
    x = jnp.arange(6.0)[None, :, None, None, None]

    def forward(x, level):
        return x + 100.0

    def backward(x, level):
        return x + jnp.arange(6.0)[None, :, None, None, None] * 10.0

    predict = alternating(forward, backward, 2)
    odd = predict(x, jnp.ones(1), {"forward": jnp.bool_(True), "scale": None})
    np.testing.assert_array_equal(odd, x + 100.0)
    even = predict(x, jnp.ones(1), {"forward": jnp.bool_(False), "scale": None})
    np.testing.assert_array_equal(even.ravel(), [30, 41, 52, 3, 14, 25])
