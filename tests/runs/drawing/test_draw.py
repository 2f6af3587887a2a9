"""What is done to drawn images, and how many are drawn at once."""

import warnings

import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.runs.drawing.draw import (
    NonFiniteWarning,
    rows_of_call,
    warn_of_non_finite,
)


def test_calls_are_rounded_up_to_the_devices_and_not_larger_than_needed():
    experiment = built("configs/mnist.py:tiny", devices=8)
    assert rows_of_call(experiment, 3, None) == 8 and rows_of_call(experiment, 100, None) == 64
    assert rows_of_call(experiment, 100, 9) == 16
    with pytest.raises(ValueError, match="batch_size = 0 should be at least 1"):
        rows_of_call(experiment, 3, 0)


def test_images_that_are_not_finite_are_named():
    drawn = np.zeros((3, 2, 2, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_non_finite(drawn)
    drawn[1, 0, 0] = np.inf
    with pytest.warns(NonFiniteWarning, match="1 of 3 images holds NaN or infinity: 1$"):
        warn_of_non_finite(drawn)
