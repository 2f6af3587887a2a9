"""Pictures of any size become what is drawn: stretched, cut or padded."""

import numpy as np
import pytest

from diffusion_jax.runs.inputs.fitting import extend, fit_masks, fit_pixels

# 4 x 8 pixels, black, grey, grey and white from left to right.
WIDE = np.repeat(np.array([0, 0, 100, 100, 100, 100, 250, 250], np.uint8)[None], 4, 0)[
    None, ..., None
]


def test_resize_changes_both_sides():
    got = fit_pixels(WIDE, (4, 4), "resize")[0, 0, :, 0].astype(int)
    assert got[0] < 30 and got[-1] > 220 and np.all(np.diff(got) >= 0)


def test_crop_takes_the_middle_and_only_that():
    assert np.all(fit_pixels(WIDE, (4, 4), "crop") == 100)
    assert np.all(fit_pixels(WIDE.swapaxes(1, 2), (8, 8), "crop") == 100)


def test_pad_repeats_the_edges_around_the_whole():
    tall = WIDE.swapaxes(1, 2)
    got = fit_pixels(tall, (8, 12), "pad")
    np.testing.assert_array_equal(got[:, :, 4:8], tall)
    np.testing.assert_array_equal(got[0, :, 0], tall[0, :, 0])
    mask = fit_masks(np.ones((1, 8, 4, 1), np.float32), (8, 12), "pad")
    assert mask[..., 4:8, :].min() == 1.0 and mask.sum() == 32


@pytest.mark.parametrize("how", ["resize", "crop", "pad"])
@pytest.mark.parametrize("old", [(1, 300), (300, 1), (7, 5), (16, 16)])
def test_every_size_becomes_the_wanted_one(how, old):
    rows = np.full((2, *old, 3), 9, np.uint8)
    got = fit_pixels(rows, (16, 24), how)
    assert got.shape == (2, 16, 24, 3) and np.all(got == 9)
    assert fit_masks(np.ones((1, *old, 1), np.float32), (16, 24), how).shape == (1, 16, 24, 1)


def test_edges_are_repeated_up_to_a_multiple():
    got = extend(WIDE, 3)
    assert got.shape == (1, 6, 9, 1) and np.all(got[:, :, -1] == 250)
    assert extend(WIDE, 4) is WIDE
