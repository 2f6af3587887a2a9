"""The sampling API: deterministic per image, guided, inpainting, and honest about bad input."""

import jax
import numpy as np
import pytest

from diffusion_jax import Pipeline
from diffusion_jax.build import experiment
from diffusion_jax.cli.arguments import load_config


@pytest.fixture(scope="module")
def pipe():
    config = load_config("configs/mnist.py:tiny", ["--config.sampler.num_steps=3"])
    built = experiment(config, devices=jax.devices()[:1])
    params = built.init_state().params
    keys = iter(jax.random.split(jax.random.key(7), 1000))
    # Zero-initialised outputs would hide everything.
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(next(keys), p.shape), params)
    return Pipeline(built, params, built.random_frozen())


def test_images_are_pixels(pipe):
    images = pipe([1, 2, 3])
    assert images.shape == (3, 28, 28, 1) and images.dtype == np.uint8
    assert images.std() > 10


def test_image_i_depends_on_seed_and_i_only(pipe):
    whole = pipe([1, 2, 3, 4, 5], seed=3).astype(int)
    chunked = pipe([1, 2, 3, 4, 5], seed=3, batch_size=2).astype(int)
    fewer = pipe([1, 2], seed=3).astype(int)
    # Programs for different batch sizes may round differently, by one grey level at the most.
    assert np.abs(whole - chunked).max() <= 1
    assert np.abs(whole[:2] - fewer).max() <= 1
    assert np.abs(whole[0] - whole[1]).max() > 20
    assert np.abs(pipe([1, 2], seed=4).astype(int) - fewer).max() > 20
    np.testing.assert_array_equal(pipe([1, 2], seed=3), fewer)


def test_guidance_changes_the_image_and_one_is_none(pipe):
    plain, strong = pipe([1], guidance_scale=1.0), pipe([1], guidance_scale=6.0)
    assert np.abs(plain.astype(int) - strong.astype(int)).max() > 5
    almost = pipe([1], guidance_scale=1.0 + 1e-6)
    assert np.abs(plain.astype(int) - almost.astype(int)).max() <= 1


def test_inpainting_keeps_what_the_mask_keeps(pipe):
    image = np.full((28, 28, 1), 255, np.uint8)
    mask = np.zeros((28, 28, 1), np.float32)
    mask[:14] = 1.0
    images = pipe([1, 2], image=image, mask=mask, num_steps=20)
    free = pipe([1, 2], num_steps=20)
    assert np.all(images[:, :14] == 255) and images[:, 14:].std() > 10
    # What is drawn knows of what is kept.
    assert np.abs(images[:, 14:].astype(int) - free[:, 14:]).mean() > 2


def test_one_condition_can_be_repeated(pipe):
    assert len(pipe(4, n=3)) == 3 and len(pipe(["4"], n=2)) == 2
    assert pipe.num_classes() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(conditions=[10]), "class 10 is out of range"),
        (dict(conditions=None), "this model is conditional"),
        (dict(conditions=[1], num_steps=0), "num_steps = 0"),
        (dict(conditions=[1], num_steps=1001), "num_steps = 1001"),
        (dict(conditions=[1], batch_size=0), "batch_size = 0 should be at least 1"),
        (dict(conditions=[1], image=np.zeros((28, 28, 1), np.uint8)), "an image needs strength"),
        (dict(conditions=[1], mask=np.zeros((28, 28, 1))), "needs both image and mask"),
        (
            dict(conditions=[1], image=np.zeros((28, 28, 1)), mask=np.zeros((28, 28, 1))),
            "float64; it should be uint8",
        ),
        (
            dict(conditions=[1], image=np.zeros((8, 8, 1), np.uint8), mask=np.zeros((28, 28, 1))),
            r"image has shape \(8, 8, 1\)",
        ),
    ],
)
def test_bad_input_is_one_sentence(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        Pipeline.from_workdir(tmp_path)
