"""The estimate of motion follows a known velocity, whatever the picture, its size and its light."""

import numpy as np
import pytest

from diffusion_jax.data.motion import USUAL_SPEED, motion_bucket, motion_speed


def waves(height, width, shift, *, frames=6, seed=0, gain=1.0, light=0.0):
    """A sum of plane waves of all directions that moves by shift (rows, columns) a frame."""
    rng = np.random.default_rng(seed)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 48))
    number = rng.uniform(3, 14, 48) / min(height, width)
    rows, columns = np.mgrid[:height, :width].astype(float)
    clip = []
    for t in range(frames):
        y, x = rows - shift[0] * t, columns - shift[1] * t
        angles = 2 * np.pi * number * (y[..., None] * np.sin(angle) + x[..., None] * np.cos(angle))
        clip.append(128 + light * t + gain * 8 * np.cos(angles + phase).sum(-1))
    return np.clip(clip, 0, 255).astype(np.uint8)[..., None]


@pytest.mark.parametrize("step", [(1.0, 0.0), (0.0, 2.0), (1.5, 1.5), (0.3, -0.4)])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_a_translation_has_its_speed(step, size):
    speed = motion_speed(waves(*size, step), fps=10.0)
    assert speed == pytest.approx(np.hypot(*step) * 10 / 64, rel=0.2)


def test_neither_size_nor_contrast_nor_light_changes_the_speed():
    plain = motion_speed(waves(64, 64, (1, 1)), 8.0)
    assert motion_speed(waves(128, 128, (2, 2)), 8.0) == pytest.approx(plain, rel=0.05)
    assert motion_speed(waves(64, 64, (1, 1), gain=0.3), 8.0) == pytest.approx(plain, rel=0.1)
    assert motion_speed(waves(64, 64, (1, 1), gain=0.5, light=4), 8.0) == pytest.approx(
        plain, rel=0.1
    )
    colour = np.repeat(waves(64, 64, (1, 1)), 3, axis=-1)
    assert motion_speed(colour, 8.0) == pytest.approx(plain, rel=0.01)


def test_every_second_frame_at_half_the_rate_has_the_same_speed():
    clip = waves(64, 64, (0.5, 0), frames=9)
    assert motion_speed(clip[::2], 5.0) == pytest.approx(motion_speed(clip, 10.0), rel=0.05)


def test_what_does_not_move_stands_still():
    assert motion_speed(waves(32, 32, (0, 0)), 30.0) == 0.0
    assert motion_speed(waves(32, 32, (0, 0), frames=1), 30.0) == 0.0
    black = np.zeros((4, 8, 8, 3), np.uint8)
    assert motion_speed(black, 30.0) == 0.0
    assert motion_speed(black + np.arange(4, dtype=np.uint8)[:, None, None, None], 30.0) == 0.0


def test_a_tiny_frame_is_measured_too():
    assert motion_speed(np.zeros((3, 1, 1, 1), np.uint8), 8.0) == 0.0


def test_buckets_are_svd_s_range():
    assert motion_bucket(0.0) == 0
    assert motion_bucket(USUAL_SPEED) == 128
    assert [motion_bucket(s) for s in (0.02, 0.05, 0.3, 1e9)] == [33, 75, 223, 255]
