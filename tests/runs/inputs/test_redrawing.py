"""What a call makes of an image and a mask, for models that read them and models that do not."""

from typing import Any

import numpy as np
import pytest

from diffusion_jax.experiment.network.network import Network
from diffusion_jax.models.conditioning.spatial_inputs import image_latents, inpainting_mask
from diffusion_jax.runs.inputs.redrawing import (
    check_pictures,
    finished,
    for_sampler,
    image_inputs,
    pictures_of_call,
)

INPAINTING = {
    "mask": inpainting_mask(),
    "image": image_latents(input_key="masked_image"),
}
EDITING = {"image": image_latents(input_key="original_image", ucg_rate=0.1)}
IMAGE = np.array([[0, 255], [255, 0]], np.uint8).reshape(1, 2, 2, 1)
MASK = np.array([[1.0, 0.4], [0.6, 0.0]], np.float32).reshape(1, 2, 2, 1)


class InFours(Network):
    """A network of pixels that works on multiples of 4."""

    def size_multiple(self):
        return 4


def network(embedders):
    module: Any = None
    return InFours(module, embedders, "concat", (2, 2, 1))


def test_a_model_without_such_inputs_blends():
    pictures = {"image": IMAGE, "mask": MASK}
    assert image_inputs(network({}), pictures, {}) == {}
    assert set(for_sampler(network({}), pictures, None)) == {"image", "mask"}
    assert set(for_sampler(network({}), {"image": IMAGE}, 0.5)) == {"image"}


def test_an_inpainting_model_reads_the_image_where_the_mask_keeps_it():
    pictures = {"image": IMAGE, "mask": MASK}
    found = image_inputs(network(INPAINTING), pictures, {})
    np.testing.assert_array_equal(found["mask"].ravel(), [1, 0, 1, 0])
    np.testing.assert_array_equal(found["masked_image"].ravel(), [-1, 0, 1, 0])
    assert for_sampler(network(INPAINTING), pictures, None) == {}
    assert set(for_sampler(network(INPAINTING), pictures, 0.5)) == {"image"}


def test_an_edit_model_reads_the_image_and_may_keep_a_part():
    found = image_inputs(network(EDITING), {"image": IMAGE}, {})
    np.testing.assert_array_equal(found["original_image"], IMAGE / 127.5 - 1.0)
    assert for_sampler(network(EDITING), {"image": IMAGE}, None) == {}
    kept = for_sampler(network(EDITING), {"image": IMAGE, "mask": MASK}, None)
    assert set(kept) == {"image", "mask"}


def test_inputs_that_are_there_are_left_alone():
    assert image_inputs(network(EDITING), {}, {"original_image": IMAGE}) == {}


@pytest.mark.parametrize(
    ("embedders", "pictures", "message"),
    [
        (INPAINTING, {}, "image = None should be given: this model completes images by image and"),
        (INPAINTING, {"image": IMAGE}, "mask = None should be given: this model completes images"),
        (EDITING, {}, "image = None should be given: this model edits images by image$"),
    ],
)
def test_what_is_missing_is_told(embedders, pictures, message):
    with pytest.raises(ValueError, match=message):
        image_inputs(network(embedders), pictures, {})


def test_a_mask_follows_its_image(caplog):
    """The image is cut to its middle, and a mask of another size with it; both are extended."""
    image = np.zeros((6, 12, 1), np.uint8)
    mask = np.zeros((3, 6), np.float32)
    mask[:, 3:] = 1.0
    found = pictures_of_call(network({}), image, mask, 2, (6, 6, 1), "crop")
    assert found["image"].shape == (2, 8, 8, 1) == found["mask"].shape
    np.testing.assert_array_equal(found["mask"][0, 0, :, 0], [0, 0, 0, 1, 1, 1, 1, 1])
    assert "mask is 3 x 6 pixels and is resized to 6 x 12" in caplog.text
    assert "image is 6 x 12 pixels and is cropped to 6 x 6" in caplog.text
    drawn = np.full((2, 8, 8, 1), 7, np.uint8)
    got = finished(drawn, found, (6, 6))
    assert got.shape == (2, 6, 6, 1) and got[0, 0, :, 0].tolist() == [7, 7, 7, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, None, "crop"), "resize = 'crop' needs an image to fit"),
        ((IMAGE, None, 0.5, "stretch"), "resize = 'stretch' is unknown; choose from resize, crop"),
        ((IMAGE, None, None, None), "an image needs strength"),
    ],
)
def test_what_does_not_go_together_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_pictures(network({}), *arguments)
    check_pictures(network(EDITING), IMAGE, None, None, None)
