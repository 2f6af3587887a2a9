"""Angles of an orbit as SV3D's script has them, and objects on white."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.runs.inputs.arrays import read_picture
from diffusion_jax.runs.inputs.orbits import object_on_white, objects_on_white, orbit


def test_an_orbit_goes_once_around_and_ends_at_the_picture():
    """21 frames: 360 / 21 degrees, twice that, ... and 0 at the last one."""
    found = orbit(21)
    want = [*np.deg2rad(360.0 / 21 * np.arange(1, 21)), 0.0]
    np.testing.assert_allclose(found.azimuths, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.polars, np.deg2rad(80.0), rtol=1e-6)


def test_angles_count_from_the_last_and_only_the_others_are_sorted():
    found = orbit(4, [0.0, 30.0, -30.0, 90.0], [100.0, 50.0, 350.0, 20.0])
    np.testing.assert_allclose(np.rad2deg(found.azimuths), [30.0, 80.0, 330.0, 0.0], atol=1e-3)
    np.testing.assert_allclose(np.rad2deg(found.polars), [90, 60, 120, 0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 10.0, [1.0, 2.0]), "azimuths has 2 angles; it should have 4"),
        ((4, [1.0, 2.0]), "elevations has 2 angles; it should have 4"),
        ((2, float("nan")), "elevations = nan should be finite numbers"),
    ],
)
def test_wrong_angles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        orbit(*arguments)


def test_an_object_is_centred_and_takes_its_share():
    """A red bar at the edge, 20 high and 10 wide, of a picture that is wider than high."""
    picture = np.zeros((30, 40, 4), np.uint8)
    picture[10:30, 30:40] = [255, 0, 0, 255]
    for kind in (picture, Image.fromarray(picture)):
        drawn = object_on_white(kind, (40, 40), 0.5)
        assert drawn.shape == (40, 40, 3) and drawn.dtype == np.uint8
        red = np.argwhere(drawn[..., 1] < 128)
        np.testing.assert_allclose(red.min(0), [10, 15], atol=1)
        np.testing.assert_allclose(red.max(0), [29, 24], atol=1)
        np.testing.assert_array_equal(drawn[0, 0], 255)
    kept = np.argwhere(object_on_white(picture, (40, 40))[..., 1] < 128)
    np.testing.assert_array_equal(np.ptp(kept, axis=0) + 1, [20, 10])


def test_an_object_higher_than_the_picture_is_wide_fits_and_none_is_refused():
    tall = np.full((50, 10, 3), 60, np.uint8)
    np.testing.assert_allclose(object_on_white(tall, (20, 20))[10, 10], 60, atol=2)
    with pytest.raises(ValueError, match="wholly transparent"):
        object_on_white(np.zeros((5, 5, 4), np.uint8), (8, 8))
    with pytest.raises(ValueError, match=r"share = 1.5 should be above 0 and at most 1"):
        object_on_white(tall, (8, 8), 1.5)


def test_all_frames_of_a_video_are_cut_alike():
    """A bar of 4 x 2 pixels that moves from the middle, 8 pixels to the right: a square of 20."""
    frames = np.full((3, 32, 32, 3), 255, np.uint8)
    for time, frame in enumerate(frames):
        frame[14:18, 16 + 4 * time : 18 + 4 * time] = [0, 0, 200]
    drawn = objects_on_white(frames, (40, 40), 0.5)  # 40 pixels of the original, as it is
    assert drawn.shape == (3, 40, 40, 3)
    for time, frame in enumerate(drawn):
        found = np.argwhere(frame[..., 0] < 128)
        np.testing.assert_array_equal(found.min(0), [18, 20 + 4 * time])
        np.testing.assert_array_equal(found.max(0), [21, 21 + 4 * time])


def test_an_opacity_says_what_the_object_of_a_video_is():
    """White is background only where nothing is transparent; frames may be wider than high."""
    frames = np.zeros((2, 20, 40, 4), np.uint8)
    frames[0, 5:15, 15:25], frames[1, 5:15, 10:20] = 255, 255
    frames[:, :, :, :3] = 200
    drawn = objects_on_white(frames, (20, 20), 1.0)  # 10 pixels to the left of the middle
    np.testing.assert_array_equal(np.argwhere(drawn[0, ..., 0] < 228)[[0, -1]], [[5, 5], [14, 14]])
    np.testing.assert_array_equal(np.argwhere(drawn[1, ..., 0] < 228)[[0, -1]], [[5, 0], [14, 9]])
    with pytest.raises(ValueError, match="frame . of the video has .* pixels; it should have"):
        objects_on_white([frames[0], frames[1, :, :30]], (20, 20), 1.0)


def stored_turned(path, pixels):
    """Write a picture that a camera held sideways would write of these upright pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    Image.fromarray(np.rot90(pixels)).save(path, exif=exif)
    return path


def test_objects_are_upright_and_of_8_bits_however_they_are_stored(tmp_path):
    """A grey half above a white one: as it is, turned by a camera, and of 16 bits."""
    pixels = np.full((20, 30), 255, np.uint8)
    pixels[:10] = 128
    stored_turned(tmp_path / "turned.png", pixels)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    for kind in (
        read_picture(tmp_path / "turned.png"),
        Image.open(tmp_path / "turned.png"),
        read_picture(tmp_path / "deep.png"),
        Image.open(tmp_path / "deep.png"),
        pixels.astype(np.uint16) * 257,
    ):
        want = object_on_white(pixels, (30, 30))
        np.testing.assert_array_equal(object_on_white(kind, (30, 30)), want)
        assert want[8, 15].tolist() == [128] * 3 and want[22, 15].tolist() == [255] * 3
        clip = objects_on_white([kind, pixels], (30, 30), 1.0)
        np.testing.assert_array_equal(clip[0], clip[1])
