"""Images to what a model denoises and back, in calls of any number of rows."""

import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.pipeline import Pipeline


def pipeline(path):
    weights = trained(path)
    return Pipeline(built(path), weights.params, weights.frozen)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_a_model_of_pixels_is_the_identity():
    pipe = pipeline("configs/mnist.py:tiny")
    pixels = images(3, 28, 28, 1)
    x = pipe.encode(pixels, batch_size=2)
    assert x.dtype == np.float32 and np.abs(x - (pixels / 127.5 - 1.0)).max() < 1e-6
    np.testing.assert_array_equal(pipe.decode(x, batch_size=2), pixels)


@pytest.mark.slow
def test_latents_of_a_call_are_those_of_decode():
    """What a sampler leaves, decoded afterwards, are the pixels that it would have given."""
    pipe = pipeline("configs/sd15.py:tiny")
    x = pipe("a red fox", num_steps=1, output="latents", guidance_scale=1.0)
    np.testing.assert_array_equal(
        pipe.decode(x), pipe("a red fox", num_steps=1, guidance_scale=1.0)
    )
    assert pipe.encode(images(16, 24, 3)).shape == (1, 8, 12, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.encode(images(15, 16, 3)), "images are 15 x 16 pixels; .* of 2"),
        (
            lambda pipe: pipe.encode(images(16, 16, 1)),
            r"images has shape \(16, 16, 1\); it should be \(H, W, 3\) or \(B, H, W, 3\)",
        ),
        (lambda pipe: pipe.encode(np.zeros((8, 8, 3))), "float64; it should be uint8"),
        (lambda pipe: pipe.decode(np.zeros((8, 8, 4))), r"it should be \(B, h, w, 4\)"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(pipeline("configs/sd15.py:tiny"))
