"""Hints that are made of images."""

import numpy as np

from diffusion_jax.data.hints import canny


def test_canny_finds_the_edge_of_a_square_and_nothing_in_a_plane():
    images = np.full((2, 24, 24, 3), -1.0, np.float32)
    images[0, 6:18, 6:18] = 1.0
    edges = canny(images)
    assert edges.shape == images.shape and edges.dtype == np.float32
    assert set(np.unique(edges)) == {-1.0, 1.0} and np.all(edges[1] == -1.0)
    rows, columns = np.nonzero(edges[0, ..., 0] == 1.0)
    distance = np.maximum(np.abs(rows - 11.5), np.abs(columns - 11.5))
    assert len(rows) >= 40 and np.all(np.abs(distance - 6.0) < 1.0)
