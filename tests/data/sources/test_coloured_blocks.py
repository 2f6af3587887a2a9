"""Blocks look as geometry says that their cameras see them, the same in every preparation."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.sources.coloured_blocks import FACES, blocks, seen
from diffusion_jax.data.sources.open_source import open_source

BLUE, RED, YELLOW, GREEN, BOTTOM, TOP = range(6)  # -x, +x, -y, +y, -z, +z
HALF = np.array([0.5, 0.4, 0.3])


def face_at(picture, row, column):
    """Tell which face a pixel shows; -1 for white and for edges."""
    same = (picture[row, column] == FACES).all(-1)
    return int(same.argmax()) if same.any() else -1


def pixel_of(point, elevation, azimuth, size):
    """Project a point by a rotation about the upright axis, then one about the camera's right."""
    a, e = np.deg2rad([azimuth, elevation])
    x, y, z = point
    depth, across = x * np.cos(a) + y * np.sin(a), -x * np.sin(a) + y * np.cos(a)
    towards, up = depth * np.cos(e) + z * np.sin(e), -depth * np.sin(e) + z * np.cos(e)
    scale = 4.0 / (4.0 - towards) / 1.1 * size / 2
    return size / 2 - up * scale - 0.5, size / 2 + across * scale - 0.5


@pytest.mark.parametrize(
    ("azimuth", "face"), [(0.0, RED), (90.0, GREEN), (180.0, BLUE), (270.0, YELLOW), (360.0, RED)]
)
def test_a_quarter_turn_shows_the_next_side(azimuth, face):
    picture = seen(blocks(HALF, 45.0), 0.0, azimuth, 32)
    assert face_at(picture, 16, 16) == face and (picture[0] == 255).all()


def test_a_camera_whose_azimuth_grows_moves_to_its_right_and_up_shows_the_top():
    picture = seen(blocks(HALF, 45.0)[:1], 0.0, 30.0, 64)
    columns = [face_at(picture, 32, column) for column in range(64)]
    assert columns.index(RED) < columns.index(GREEN)
    picture = seen(blocks(HALF, 45.0)[:1], 40.0, 0.0, 64)
    rows = [face_at(picture, row, 32) for row in range(64)]
    assert rows.index(TOP) < rows.index(RED) and BOTTOM not in rows
    assert BOTTOM in seen_faces(-40.0, 0.0) and TOP not in seen_faces(-40.0, 0.0)


def seen_faces(elevation, azimuth):
    picture = seen(blocks(HALF, 45.0)[:1], elevation, azimuth, 32)
    return {face_at(picture, row, column) for row in range(32) for column in range(32)}


@pytest.mark.parametrize(
    ("elevation", "azimuth"), [(0.0, 0.0), (25.0, 40.0), (-15.0, 200.0), (35.0, 310.0)]
)
def test_points_are_where_a_pinhole_camera_has_them(elevation, azimuth):
    """The corners of what is not white are the corners of the block, in another formula."""
    picture = seen(blocks(HALF, 0.0)[:1], elevation, azimuth, 96)
    corners = np.stack(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), -1).reshape(-1, 3) * HALF
    wanted = np.array([pixel_of(corner, elevation, azimuth, 96) for corner in corners])
    found = np.argwhere((picture != 255).any(-1))
    np.testing.assert_allclose(found.min(0), wanted.min(0), atol=1.0)
    np.testing.assert_allclose(found.max(0), wanted.max(0), atol=1.0)


def test_the_cube_hides_and_is_hidden():
    front, behind = (seen(blocks(HALF, turn), 30.0, 0.0, 64) for turn in (0.0, 180.0))
    dark = [np.argwhere(picture.max(-1) < 80)[:, 0].max() for picture in (front, behind)]
    assert dark[0] > dark[1] + 5  # nearer to the camera is lower in the picture


def pictures(record):
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in record["video"]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    options = {"data_dir": tmp_path_factory.mktemp("tfds"), "num_examples": 6, "num_frames": 4}
    kinds = {"orbit": {}, "views": {"num_views": 3}}
    return {
        name: open_source("coloured_blocks", "train", **options, **own)
        for name, own in kinds.items()
    }


def test_an_orbit_goes_once_around_a_block_that_stands_still(sources):
    for record in sources["orbit"]:
        turns = np.diff(record["azimuths"]) % 360
        assert (turns > 17).all() and turns.sum() < 343 and np.ptp(turns) > 1  # from 90 +- 72
        assert pictures(record).shape == (4, 32, 32, 3) and len(record["elevations"]) == 4
        assert "num_views" not in record
        # Sides go red, green, blue, yellow; which one faces the camera follows from its azimuth.
        for picture, azimuth in zip(pictures(record), record["azimuths"], strict=True):
            counts = [(picture == face).all(-1).sum() for face in FACES[:4]]
            wanted = (RED, GREEN, BLUE, YELLOW)[round(azimuth / 90) % 4]
            if abs(azimuth / 90 - round(azimuth / 90)) < 0.3:
                assert np.argmax(counts) == wanted


def test_views_of_a_time_stand_still_while_the_cube_moves(sources):
    for record in sources["views"]:
        assert record["num_views"] == 3
        turns = np.reshape(record["azimuths"], (4, 3))
        assert (turns == turns[:1]).all() and len(set(record["elevations"])) == 1
        np.testing.assert_allclose(np.diff(turns[0]) % 360, 120.0, atol=1e-3)
        shown = pictures(record).reshape(4, 3, 32, 32, 3).astype(int)
        assert (np.abs(np.diff(shown, axis=0)).sum((2, 3, 4)) > 0).all()  # in every view


def test_splits_differ_and_more_examples_begin_with_the_same(sources, tmp_path):
    given = {"data_dir": tmp_path, "num_frames": 4, "num_examples": 8}
    more = [tuple(record["video"]) for record in open_source("coloured_blocks", "train", **given)]
    assert {*more} >= {tuple(record["video"]) for record in sources["orbit"]}
    (other,) = open_source("coloured_blocks", "test", **given)
    assert tuple(other["video"]) not in more


def test_numbers_that_are_too_small(tmp_path):
    with pytest.raises(ValueError, match="num_views = 1 should be at least 2"):
        open_source("coloured_blocks", "train", data_dir=tmp_path, num_views=1)
