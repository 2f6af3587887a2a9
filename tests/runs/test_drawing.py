"""What is done to drawn images, and how many are drawn at once."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusion_jax.runs.drawing import (
    NonFiniteWarning,
    checked_seed,
    rows_of_call,
    warn_of_non_finite,
    with_kept,
)


def test_calls_are_rounded_up_to_the_devices_and_not_larger_than_needed():
    experiment: Any = SimpleNamespace(
        network=SimpleNamespace(num_frames=None), round_up=lambda size: -(-size // 8) * 8
    )
    assert rows_of_call(experiment, 3, None) == 8 and rows_of_call(experiment, 100, None) == 64
    assert rows_of_call(experiment, 100, 9) == 16
    experiment.network.num_frames = 4
    assert rows_of_call(experiment, 100, None) == 8
    with pytest.raises(ValueError, match="batch_size = 0 should be at least 1"):
        rows_of_call(experiment, 3, 0)


def test_what_a_mask_keeps_is_put_back():
    drawn, image = np.full((1, 1, 3, 1), 10, np.uint8), np.full((1, 1, 3, 1), 201, np.uint8)
    mask = np.array([1.0, 0.0, 0.5], np.float32).reshape(1, 1, 3, 1)
    assert with_kept(drawn, image, mask).ravel().tolist() == [201, 10, 106]


def test_images_that_are_not_finite_are_named():
    drawn = np.zeros((3, 2, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_non_finite(drawn)
    drawn[1, 0, 0] = np.inf
    with pytest.warns(NonFiniteWarning, match="1 of 3 images hold NaN or infinity: 1$"):
        warn_of_non_finite(drawn)


def test_a_seed_is_drawn_and_said(caplog):
    assert checked_seed(np.int64(3)) == 3
    drawn = checked_seed(None)
    assert f"seed = {drawn} was drawn" in caplog.text
