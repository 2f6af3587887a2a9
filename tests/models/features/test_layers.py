"""Layers of feature networks against loops and closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from diffusion_jax.models.features.layers import (
    conv,
    cubic_matrix,
    depthwise,
    folded,
    resize,
    resize_tf1,
)

RANDOM = np.random.default_rng(0)


def test_folding_is_the_batch_norm_behind_the_convolution():
    kernel = RANDOM.standard_normal((3, 3, 1, 2)).astype(np.float32)
    mean, bias, scale = RANDOM.standard_normal((3, 2))
    var = RANDOM.uniform(0.5, 2.0, 2)
    x = RANDOM.standard_normal((1, 6, 5, 1)).astype(np.float32)
    layer = folded(kernel, mean, var, bias, scale=scale, eps=0.01)
    found = conv(jnp.asarray(x), layer, padding="VALID")
    for o in range(2):
        plain = signal.correlate(x[0, :, :, 0], kernel[:, :, 0, o], "valid")
        expected = (plain - mean[o]) / np.sqrt(var[o] + 0.01) * scale[o] + bias[o]
        np.testing.assert_allclose(found[0, :, :, o], expected, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_depthwise_is_a_correlation_of_each_channel(stride, size):
    """TensorFlow pads evenly, and an odd rest below and to the right."""
    x = RANDOM.standard_normal((1, 8, 7, 2)).astype(np.float32)
    layer = {
        "kernel": RANDOM.standard_normal((size, size, 1, 2)).astype(np.float32),
        "bias": np.array([1.0, -2.0], np.float32),
    }
    found = depthwise(jnp.asarray(x), layer, stride=stride)
    for c in range(2):
        pads = []
        for n in (8, 7):
            total = max((-(-n // stride) - 1) * stride + size - n, 0)
            pads.append((total // 2, total - total // 2))
        padded = np.pad(x[0, :, :, c], pads)
        plain = signal.correlate(padded, layer["kernel"][:, :, 0, c], "valid")
        expected = plain[::stride, ::stride] + layer["bias"][c]
        np.testing.assert_allclose(found[0, :, :, c], expected, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [((4, 4), 7), ((9, 5), 6), ((3, 8), 8)])
def test_resizing_as_tensorflow_1_did(old, new):
    """Pixel i of the result lies at i * old / new, between its two neighbours."""
    image = RANDOM.standard_normal(old).astype(np.float32)
    expected = np.zeros((new, new))
    for i in range(new):
        for j in range(new):
            y, x = i * old[0] / new, j * old[1] / new
            low = int(y), int(x)
            high = min(low[0] + 1, old[0] - 1), min(low[1] + 1, old[1] - 1)
            dy, dx = y - low[0], x - low[1]
            top = image[low[0], low[1]] * (1 - dx) + image[low[0], high[1]] * dx
            bottom = image[high[0], low[1]] * (1 - dx) + image[high[0], high[1]] * dx
            expected[i, j] = top * (1 - dy) + bottom * dy
    found = resize_tf1(jnp.asarray(image[None, :, :, None]), new)
    np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-5)


def test_cubics_repeat_quadratics_inside_and_sum_to_one():
    matrix = cubic_matrix(12, 7, a=-0.5)  # Keys' choice repeats polynomials up to degree two
    np.testing.assert_allclose(matrix.sum(1), 1.0)
    places = (np.arange(7) + 0.5) * 12 / 7 - 0.5
    inside = (places >= 1) & (places <= 10)
    found = matrix @ np.arange(12.0) ** 2
    np.testing.assert_allclose(found[inside], places[inside] ** 2)
    np.testing.assert_allclose(cubic_matrix(5, 5), np.eye(5), atol=1e-15)


def test_resizing_keeps_a_constant_and_channels():
    found = resize(jnp.full((2, 5, 7, 3), 9.0), 4, "bicubic")
    assert found.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(found, 9.0, rtol=1e-5)
