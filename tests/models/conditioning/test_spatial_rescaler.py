"""Resampling like PyTorch's: matrices with known entries, and the rescaler made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioning.spatial_rescaler import (
    METHODS,
    SpatialRescaler,
    interpolation_matrix,
    resample,
)

IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 6, 3)), jnp.float32)


def rescale(image, **fields):
    module = SpatialRescaler(**fields)
    return module.apply(module.init(jax.random.key(0), image), image)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size_in", "size_out"), [(6, 3), (5, 3), (4, 8), (7, 7)])
def test_a_constant_stays_constant(method, size_in, size_out):
    matrix = interpolation_matrix(size_in, size_out, method)
    assert matrix.shape == (size_out, size_in) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix.sum(-1), 1.0, rtol=1e-6)
    if size_in == size_out:
        np.testing.assert_allclose(matrix, np.eye(size_in), atol=1e-7)


def test_known_rows():
    rows = {
        "nearest": [0, 0, 1, 0, 0, 0],
        "bilinear": [0, 0, 0.5, 0.5, 0, 0],
        "area": [0, 0, 0.5, 0.5, 0, 0],
        # Half-way between pixels, Keys' kernel with a = -3/4: (a (x^3 - 5 x^2 + 8 x - 4)) at 3/2.
        "bicubic": [0, -3 / 32, 19 / 32, 19 / 32, -3 / 32, 0],
    }
    for method, row in rows.items():
        np.testing.assert_allclose(interpolation_matrix(6, 3, method)[1], row, atol=1e-7)


def test_enlarging():
    bilinear = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(interpolation_matrix(2, 4, "bilinear"), bilinear)
    nearest = [[1, 0], [1, 0], [0, 1], [0, 1]]
    np.testing.assert_allclose(interpolation_matrix(2, 4, "nearest"), nearest)
    corners = interpolation_matrix(3, 5, "bilinear", align_corners=True)
    np.testing.assert_allclose(corners @ [0.0, 2.0, 4.0], [0, 1, 2, 3, 4], atol=1e-6)


def test_cubic_weights_at_quarters():
    """Keys' kernel with a = -3/4 at distances 7/4, 3/4, 1/4 and 5/4, in fractions of 256."""
    row = interpolation_matrix(6, 12, "bicubic")[6]
    np.testing.assert_allclose(row, np.array([0, -9, 67, 225, -27, 0]) / 256)
    corners = interpolation_matrix(9, 25, "bicubic", align_corners=True)
    np.testing.assert_allclose(corners[::3], np.eye(9), atol=1e-6)


def test_area_averages_blocks_that_overlap():
    np.testing.assert_allclose(
        interpolation_matrix(5, 2, "area"), [[1 / 3] * 3 + [0, 0], [0, 0] + [1 / 3] * 3], rtol=1e-6
    )


def test_a_given_factor_places_the_pixels():
    """With 5 pixels and factor 1/2, PyTorch reads at 0.5 and 2.5, not at 0.75 and 3.25."""
    given = interpolation_matrix(5, 2, "bilinear", factor=0.5)
    np.testing.assert_allclose(given, [[0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0]])
    exact = interpolation_matrix(5, 2, "bilinear")
    np.testing.assert_allclose(exact, [[0.25, 0.75, 0, 0, 0], [0, 0, 0, 0.75, 0.25]])


def test_rows_and_columns_are_not_confused():
    rows, columns = (interpolation_matrix(n, m, "nearest") for n, m in ((8, 2), (6, 3)))
    np.testing.assert_array_equal(resample(IMAGE, rows, columns), IMAGE[:, ::4, ::2])


def test_bilinear_halving_is_the_mean_of_four_pixels():
    blocks = np.asarray(IMAGE).reshape(2, 4, 2, 3, 2, 3)
    np.testing.assert_allclose(rescale(IMAGE), blocks.mean((2, 4)), rtol=1e-5, atol=1e-6)
    twice = rescale(IMAGE, n_stages=2)
    np.testing.assert_allclose(twice, rescale(rescale(IMAGE)), rtol=1e-6)
    assert twice.shape == (2, 2, 1, 3)
    np.testing.assert_array_equal(rescale(IMAGE, n_stages=0), IMAGE)


def test_channels_are_mapped():
    module = SpatialRescaler(out_channels=2, bias=True)
    params = module.init(jax.random.key(1), IMAGE)["params"]["channel_mapper"]
    assert params["kernel"].shape == (1, 1, 3, 2) and params["bias"].shape == (2,)
    ours = module.apply({"params": {"channel_mapper": params}}, IMAGE)
    expected = np.asarray(rescale(IMAGE)) @ np.asarray(params["kernel"][0, 0])
    expected = expected + np.asarray(params["bias"])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    shapes = jax.eval_shape(SpatialRescaler(out_channels=2).init, jax.random.key(0), IMAGE)
    assert set(shapes["params"]["channel_mapper"]) == {"kernel"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"method": "cubic"}, "method = 'cubic' is unknown; choose one of nearest, bilinear"),
        ({"in_channels": 4}, "got 3 channels and has in_channels = 4"),
        ({"n_stages": 3}, "n_stages = 3 with multiplier = 0.5 leave nothing of 8 x 6 pixels"),
    ],
)
def test_mistakes_are_named(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        rescale(IMAGE, **fields)
