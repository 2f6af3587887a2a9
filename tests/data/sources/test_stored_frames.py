"""Frames are cut into records one after the other, and cameras counted before that."""

import types

import numpy as np
import pytest
from PIL import Image
from support.videos import grey_frames, write_video

from diffusion_jax.data import transforms
from diffusion_jax.data.sources.cameras import Cameras
from diffusion_jax.data.sources.folder_scan import Item
from diffusion_jax.data.sources.stored_frames import (
    check_cameras,
    check_frame_options,
    cut,
    encode,
    png,
)
from diffusion_jax.data.sources.video_files import CorruptVideoError


def options(**given):
    plain = {"num_frames": 4, "hop": 4, "fps": None, "short_side": 8, "encoding": "png"}
    return types.SimpleNamespace(**plain | given)


@pytest.mark.parametrize(
    ("count", "hop", "firsts"),
    [
        (4, 4, [0]),
        (5, 4, [0]),
        (6, 4, [0, 2]),
        (9, 4, [0, 4]),
        (7, 2, [0, 2, 3]),
        (8, 2, [0, 2, 4]),
    ],
)
def test_cuts(count, hop, firsts):
    found = list(cut(iter(range(count)), 1.0, options(hop=hop)))
    assert found == [(first, [*range(first, first + 4)]) for first in firsts]


def test_what_is_too_short_has_no_record():
    with pytest.raises(CorruptVideoError, match="has 3 frames at 5 per second, .* num_frames = 4"):
        list(cut(iter(range(3)), 5.0, options()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hop": 0}, "hop = 0 should be at least 1"),
        ({"fps": float("inf")}, "fps = inf should be above 0"),
        ({"encoding": "gif"}, "encoding = 'gif' is unknown; choose from jpeg, png"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ValueError, match=message):
        check_frame_options(options(**given))


def test_encoded_frames():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(transforms.decode(png(pixels), 3), pixels)
    large = Image.new("RGB", (40, 20), (9, 99, 200))
    assert transforms.size_of(encode(large, options())) == (8, 16)


def item(path, cameras):
    angles = tuple(map(float, range(cameras)))
    return Item(path, path.name, None, None, cameras=Cameras(angles, angles))


def test_cameras_are_counted(tmp_path):
    """A Matroska file does not say how many frames it has, an MP4 file does."""
    files = [write_video(tmp_path / f"a.{end}", grey_frames(range(6))) for end in ("mkv", "avi")]
    for number in range(3):
        (tmp_path / "frames").mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / f"frames/{number}.png")
    (tmp_path / "torn.mp4").write_text("no video")
    right = [item(file, 6) for file in files] + [item(tmp_path / "frames", 3)]
    check_cameras([*right, item(tmp_path / "torn.mp4", 2)], options())
    for wrong in (item(files[0], 5), item(files[1], 7), item(tmp_path / "frames", 4)):
        with pytest.raises(ValueError, match=f"{wrong.path} has . frames and . cameras; give one"):
            check_cameras([wrong], options())
    with pytest.raises(ValueError, match=f"{files[0]} at fps = 5 has 3 frames and 6 cameras"):
        check_cameras([item(files[0], 6)], options(fps=5.0))
