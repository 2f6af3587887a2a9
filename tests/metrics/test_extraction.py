"""Features on a mesh: the same numbers however many devices and whatever padding; levels; keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.devices.arrays import shard_batch
from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.metrics.extraction import (
    Extractor,
    build_extract,
    digest,
    stream_all,
    to_levels,
)
from diffusion_jax.metrics.summaries import summary


def extractor(**fields):
    """Features that are easy to know: the mean of each channel, times a parameter."""

    def features(params, images):
        return jnp.mean(images, (1, 2)) * params["w"]

    return Extractor("net", "k", 3, {"w": jnp.float32(2.0)}, features)._replace(**fields)


IMAGES = np.random.default_rng(0).uniform(-1, 1, (16, 4, 5, 3)).astype(np.float32)


def test_features_are_of_levels_on_any_mesh():
    expected = np.rint((IMAGES.astype(np.float64) + 1) * 127.5).mean((1, 2)) * 2
    for count in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:count])
        placed = shard_batch(mesh, {"image": IMAGES, "id": np.arange(16, dtype=np.int32)})
        found, ids = build_extract(extractor(), mesh)(placed["image"], placed["id"])
        np.testing.assert_allclose(found["features"], expected, rtol=1e-5)
        np.testing.assert_array_equal(ids, np.arange(16))


def test_summaries_do_not_depend_on_batches_or_padding():
    extract = build_extract(extractor(), make_mesh(devices=jax.devices()[:1]))
    stream = summary("net", "k")
    whole = stream_all(stream, extract, [(IMAGES, np.arange(16))])
    padded = [
        IMAGES[[*range(i, min(i + 3, 16)), *[0] * (i + 3 - min(i + 3, 16))]]
        for i in range(0, 16, 3)
    ]
    ids = [np.where(np.arange(i, i + 3) < 16, np.arange(i, i + 3), -1) for i in range(0, 16, 3)]
    parts = stream_all(stream, extract, reversed(list(zip(padded, ids, strict=True))))
    np.testing.assert_allclose(parts.moments.covariance, whole.moments.covariance, rtol=1e-9)
    np.testing.assert_array_equal(parts.kept.rows, whole.kept.rows)


def test_levels_are_those_of_a_file():
    values = jnp.array([-2.0, -1.0, 0.0, 0.003, 1.0, 3.0, jnp.nan])[None, :, None, None]
    found = to_levels(values)
    assert found.shape == (1, 7, 1, 3)
    np.testing.assert_array_equal(found[0, :, 0, 1], [0, 0, 128, 128, 255, 255, 0])
    with pytest.raises(ValueError, match="images of 4 channels should have 1 or 3"):
        to_levels(jnp.zeros((1, 2, 2, 4)))


def test_classes_and_the_rank_of_what_is_seen():
    def probabilities(params, features):
        return jax.nn.softmax(features * params["w"])

    mesh = make_mesh(devices=jax.devices()[:1])
    extract = build_extract(extractor(probabilities=probabilities), mesh)
    found, _ = extract(IMAGES, np.arange(16))
    np.testing.assert_allclose(found["probabilities"].sum(1), 1.0, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"'net' are features of images, and they are given.*5, 3\)"
    ):
        extract(IMAGES[None], np.arange(1))
    with pytest.raises(ValueError, match="are features of videos"):
        build_extract(extractor(of_videos=True), mesh)(IMAGES, np.arange(16))


def test_a_digest_knows_names_shapes_and_numbers():
    params = {"a": np.arange(4.0), "b": [np.zeros(2)]}
    others = [
        {"a": np.arange(4.0), "c": [np.zeros(2)]},
        {"a": np.arange(4.0).reshape(2, 2), "b": [np.zeros(2)]},
        {"a": np.arange(4.0), "b": [np.array([0.0, 1.0])]},
    ]
    assert digest(params) == digest({"b": [np.zeros(2)], "a": np.arange(4.0)})
    assert digest(params) not in [digest(other) for other in others]
