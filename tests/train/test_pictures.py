import numpy as np
import pytest

from diffusion_jax.train.pictures import caption_tiles, image_grid, to_pixels


def test_pixels_map_the_ends_and_the_middle():
    got = to_pixels(np.float32([-1.0, 0.0, 1.0, -7.0, 7.0, np.nan]))
    assert got.dtype == np.uint8
    assert got.tolist() == [0, 128, 255, 0, 255, 0]


def test_pixels_without_clamp_scale_until_it_fits():
    assert to_pixels(np.float32([-4.0, 2.0]), clamp=False).tolist() == [0, 191]
    assert to_pixels(np.float32([-0.5, 0.5]), clamp=False).tolist() == [64, 191]


def test_pixels_pass_uint8():
    pixels = np.uint8([0, 7, 255])
    assert to_pixels(pixels) is pixels


def test_grid_has_four_columns_and_black_lines():
    images = np.stack([np.full((3, 5, 3), i + 1, np.uint8) for i in range(6)])
    grid = image_grid(images)
    assert grid.shape == (2 + 2 * 5, 2 + 4 * 7, 3)
    for i in range(6):
        top, left = 2 + i // 4 * 5, 2 + i % 4 * 7
        assert (grid[top : top + 3, left : left + 5] == i + 1).all()
    assert grid.sum() == images.sum()  # all else is black


def test_grid_of_rows_keeps_its_rows():
    rows = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((1, 1, 2, 2, 1), np.uint8)
    grid = image_grid(rows, padding=0)
    assert grid[..., 0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_one_image_has_no_frame():
    image = np.ones((1, 3, 3, 3), np.uint8)
    assert image_grid(image).shape == (3, 3, 3)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4, 4), (0, 4, 4, 3), (4, 4, 3)])
def test_grid_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=str(shape)[1:-1]):
        image_grid(np.zeros(shape, np.uint8))


def test_captions_are_drawn_and_differ():
    tiles = caption_tiles(["a red fox in the snow, looking up", "", "7"], size=(32, 64))
    assert tiles.shape == (3, 32, 64, 3)
    dark = (tiles < 128).sum(axis=(1, 2, 3))
    assert dark[0] > dark[2] > 0 == dark[1]
