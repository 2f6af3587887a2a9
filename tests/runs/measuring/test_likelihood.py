"""Which models have bits per dimension, and over which images."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.data.batches import Batches
from diffusion_jax.randomness import Stream, sample_keys, stream_key
from diffusion_jax.runs.measuring import likelihood
from diffusion_jax.runs.measuring.likelihood import build_bits, has_likelihood


def split(*batches):
    """Batches of given rows, as eval_batches makes them: the last one is padded."""
    return Batches(lambda start: iter(batches[start:]), 5, len(batches), ((1, 1),))


@pytest.mark.parametrize(
    ("name", "answer"),
    [("mnist", True), ("cifar10", True), ("emoji_ldm", False), ("sdxl", False), ("vq_f4", False)],
)
def test_pixel_models_on_timesteps_have_bits_per_dimension(name, answer):
    assert has_likelihood(built(f"configs/{name}.py:tiny")) is answer


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 1, 3]), (9, [0, 1, 3, 4])])
def test_bits_are_those_of_the_first_images_each_with_a_key_of_its_own(
    monkeypatch, count, expected
):
    """Padding does not count, wherever it is; the conditions come along with their images."""
    seen = []

    def bits_per_dim(schedule, denoise, image, keys, *, parameterization):
        data = jax.random.key_data(keys)[:, -1]
        seen.append((np.asarray(image[:, 0, 0, 0]), np.asarray(data)))
        return SimpleNamespace(total=image[:, 0, 0, 0] * 10.0)

    monkeypatch.setattr(likelihood, "bits_per_dim", bits_per_dim)
    monkeypatch.setattr(jax, "jit", lambda function, **_: function)
    experiment = built("configs/mnist.py:tiny")

    def batch(first, weights):
        rows = np.arange(first, first + len(weights), dtype=np.float32)
        return {
            "image": rows[:, None, None, None] * np.ones((1, 28, 28, 1), np.float32),
            "label": np.zeros(len(rows), np.int32),
            "weight": np.asarray(weights, np.float32),
        }

    batches = split(batch(0, [1, 1, 0, 1]), batch(4, [1, 0, 0, 0]))
    params, frozen = experiment.abstract_state().params, experiment.frozen_constants()
    monkeypatch.setattr(type(experiment.network), "embed", lambda *_: None)
    bits = build_bits(experiment, frozen, batches, count)(params)
    assert bits.tolist() == [10.0 * number for number in expected]
    images, keys = (np.concatenate(part) for part in zip(*seen, strict=True))
    assert images.tolist() == expected
    own = sample_keys(stream_key(experiment.seed, Stream.LIKELIHOOD), jnp.arange(len(expected)))
    assert keys.tolist() == jax.random.key_data(own)[:, -1].tolist()
