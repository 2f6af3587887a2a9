"""Pictures of any kind become conditioning frames; what does not fit is one sentence."""

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.experiment.network.network import Network
from diffusion_jax.models.conditioning.embedders import concat_image, numbers
from diffusion_jax.runs.inputs.conditions import encode_conditions
from diffusion_jax.runs.inputs.frames import (
    _FITS,
    as_frames,
    check_frames,
    clip_conditions,
    frame_rate,
    with_picture,
)

COVER = _FITS["cover"]

EMBEDDERS = {
    "frame": concat_image(input_key="cond_frames", channels=3, ucg_rate=0.1),
    "fps": numbers(input_key="fps_id", size=1, default=(6,)),
    "noise": numbers(input_key="cond_aug", size=1, default=(0.02,)),
}
VIDEO = Network(None, EMBEDDERS, "concat-adm", (8, 8, 3), num_frames=4)
RED = np.zeros((8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
NONE = {"fps": None, "motion_bucket_id": None, "cond_aug": None}


def encoded(conditions, n=None, **numbers):
    given = clip_conditions(VIDEO, conditions, (4, 8, 8, 3), {**NONE, **numbers})
    return encode_conditions(VIDEO, given, n, tuple, (8, 8))


def test_a_picture_becomes_the_frame_and_numbers_have_defaults():
    inputs, count = encoded(RED, n=2, fps=12)
    assert count == 2 and set(inputs) == {"cond_frames_without_noise", "fps_id", "cond_aug"}
    np.testing.assert_array_equal(inputs["cond_frames_without_noise"][1, 3, 3], [1, -1, -1])
    np.testing.assert_array_equal(inputs["fps_id"], [[12], [12]])
    np.testing.assert_allclose(inputs["cond_aug"], 0.02)
    assert encoded([RED, RED, RED])[1] == 3
    assert encoded({"image": RED, "fps_id": [3, 4]})[1] == 2


def test_pictures_of_any_size_and_kind_are_cut_from_the_middle():
    """A wide picture with a red middle, half transparent: white shines through."""
    wide = np.zeros((10, 41, 4), np.uint8)
    wide[:, 13:28] = [255, 0, 0, 128]
    for picture in (wide, Image.fromarray(wide, "RGBA")):
        frame = as_frames(picture, (8, 8), 3, COVER)[0]
        np.testing.assert_allclose(frame[4, 4], [1, 0, 0], atol=0.02)
        assert frame.shape == (8, 8, 3)
    grey = as_frames(Image.new("L", (3, 200), 255), (8, 8), 3, COVER)
    np.testing.assert_array_equal(grey, np.ones((1, 8, 8, 3)))


@pytest.mark.parametrize(
    ("conditions", "numbers", "message"),
    [
        (None, {}, "makes videos of a picture: give one"),
        ([], {}, "the list of pictures is empty"),
        (np.zeros((4, 4, 7), np.uint8), {}, "the picture is no image"),
        ("photo.png", {}, "the picture is no image"),
        (
            RED,
            {"motion_bucket_id": 127},
            "motion_bucket_id = 127 does not fit: this model does not read it",
        ),
        (RED, {"cond_aug": float("nan")}, "cond_aug = nan should be a finite number"),
    ],
)
def test_what_does_not_fit_is_refused(conditions, numbers, message):
    with pytest.raises(ValueError, match=message):
        encoded(conditions, **numbers)


def test_the_number_of_frames_is_the_configs_or_a_whole_number():
    assert check_frames(VIDEO, None) == 4 and check_frames(VIDEO, 7) == 7
    with pytest.raises(ValueError, match="num_frames = 0 should be at least 1"):
        check_frames(VIDEO, 0)
    images = VIDEO._replace(num_frames=None)
    assert check_frames(images, None) is None
    with pytest.raises(ValueError, match="num_frames = 3 does not fit: this model draws images"):
        check_frames(images, 3)


def test_an_object_is_put_on_white_and_takes_the_last_frame():
    """A blue corner, the rest transparent, goes to the middle of the frame."""
    network = VIDEO._replace(frame_fit="object")
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:4, :4] = [0, 0, 255, 255]
    frame = clip_conditions(network, picture, (4, 8, 8, 3), NONE)["image"]
    np.testing.assert_array_equal(frame[0, 3, 3], [-1, -1, 1])
    np.testing.assert_array_equal(frame[0, 0, 0], [1, 1, 1])
    clips = np.full((1, 4, 8, 8, 3), 9, np.uint8)
    drawn = with_picture(network, clips, {"cond_frames_without_noise": frame})
    assert drawn.dtype == np.uint8 and drawn.shape == clips.shape
    assert drawn[0, -1, 3, 3].tolist() == [0, 0, 255] and np.all(drawn[0, :-1] == 9)
    assert with_picture(VIDEO, clips, {"cond_frames_without_noise": frame}) is clips


def test_a_model_that_reads_where_the_camera_is_gets_an_orbit():
    angles = {n: numbers(input_key=n, size=1) for n in ("polars_rad", "azimuths_rad")}
    network = VIDEO._replace(embedders=VIDEO.embedders | angles)
    given = {"image": RED, "elevations": 30.0}
    found = clip_conditions(network, given, (4, 8, 8, 3), NONE)
    np.testing.assert_allclose(np.rad2deg(found["polars_rad"])[:, 0], 60.0, rtol=1e-5)
    np.testing.assert_allclose(
        np.rad2deg(found["azimuths_rad"])[:, 0], [90, 180, 270, 0], rtol=1e-5
    )


@pytest.mark.parametrize("count", [3, 4, 6])
def test_a_clip_of_any_length_has_angles_of_each_frame(count):
    """An orbit of 3 frames has the azimuths 120, 240 and 0, whatever length was trained."""
    angles = {n: numbers(input_key=n, size=1, frames=4) for n in ("polars_rad", "azimuths_rad")}
    network = VIDEO._replace(embedders=VIDEO.embedders | angles).with_num_frames(count)
    given = clip_conditions(network, RED, (count, 8, 8, 3), NONE)
    inputs, _ = encode_conditions(network, given, None, tuple, (8, 8))
    even = np.linspace(0.0, 360.0, count + 1)[1:] % 360.0
    np.testing.assert_allclose(np.rad2deg(inputs["azimuths_rad"])[0, :, 0], even, atol=1e-4)
    assert network.num_frames == count and inputs["fps_id"].shape == (1, 1)


def test_clips_are_shown_as_fast_as_was_asked_for():
    assert frame_rate(VIDEO, None) == 7.0 and frame_rate(VIDEO, 11) == 12.0
