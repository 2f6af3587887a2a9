"""Pictures, masks and numbers that a caller gives: read right, or refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.runs.inputs.arrays import (
    as_floats,
    as_image,
    as_mask,
    number,
    read_image,
    read_mask,
    whole_number,
)


def test_a_picture_is_read_upright(tmp_path):
    """EXIF 6: the stored rows are the columns of the picture, from right to left."""
    stored = Image.fromarray(np.array([[0, 50], [100, 150], [200, 250]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    want = np.array([[200, 100, 0], [250, 150, 50]])
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", 1)[..., 0], want)
    np.testing.assert_allclose(read_mask(tmp_path / "turned.png")[..., 0], want / 255, atol=1e-6)


def test_sixteen_bits_are_not_white(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", 3).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    np.testing.assert_allclose(read_mask(tmp_path / "deep.png").ravel(), [0, 100 / 255, 1])


@pytest.mark.parametrize("colour", [0, 255])
def test_the_shape_of_a_mask_may_be_its_opacity(tmp_path, colour):
    """Opaque pixels are kept, whatever their colour."""
    rgba = np.full((2, 3, 4), colour, np.uint8)
    rgba[..., 3] = [[0, 255, 255], [0, 0, 51]]
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    want = [[0, 1, 1], [0, 0, 0.2]]
    np.testing.assert_allclose(read_mask(tmp_path / "mask.png")[..., 0], want, atol=1e-6)
    for mask in (rgba, Image.fromarray(rgba)):
        np.testing.assert_allclose(as_mask(mask)[0, ..., 0], want, atol=1e-6)


def test_a_mask_with_colours_and_opacity_counts_both():
    mask = np.array([[[255, 255], [255, 0], [0, 255], [255, 51]]], np.uint8)
    np.testing.assert_allclose(as_mask(mask).ravel(), [1, 0, 0, 0.2], atol=1e-6)


SHAPE = np.array([[0, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize(
    "mask",
    [
        SHAPE,
        SHAPE.astype(bool),
        SHAPE.astype(np.float64),
        jnp.asarray(SHAPE, jnp.bfloat16),
        (SHAPE * 255).astype(np.uint8),
        SHAPE * 255,
        (SHAPE * 65535).astype(np.uint16),
        np.repeat(SHAPE[..., None], 3, -1) * 255,
        Image.fromarray((SHAPE * 255).astype(np.uint8)),
        Image.fromarray(SHAPE.astype(bool)),
        Image.fromarray((SHAPE * 255).astype(np.uint8)).convert("RGB"),
        SHAPE[None, ..., None],
        np.stack([SHAPE, SHAPE])[..., None],
    ],
)
def test_every_form_of_a_mask(mask):
    got = as_mask(mask, 2, (2, 3))
    assert got.shape == (2, 2, 3, 1) and got.dtype == np.float32
    np.testing.assert_array_equal(got, np.stack([SHAPE, SHAPE])[..., None])


def test_masks_of_each_image_without_channels():
    masks = np.zeros((2, 5, 6))
    masks[1] = 1.0
    assert as_mask(masks, 2, (5, 6)).mean((1, 2, 3)).tolist() == [0.0, 1.0]


def test_another_size_is_resized_and_said(caplog):
    image = np.repeat(np.array([[[0], [200]]], np.uint8), 4, 0)  # 4 x 2
    got = as_image("image", image, 3, (8, 4, 1))
    assert got.shape == (3, 8, 4, 1) and got[..., 0, 0].max() < 30 < 170 < got[..., -1, 0].min()
    assert "image is 4 x 2 pixels and is resized to 8 x 4" in caplog.text
    mask = as_mask(image[..., 0] > 0, 1, (2, 2))
    assert mask[0, ..., 0].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert "mask is 4 x 2 pixels and is resized to 2 x 2" in caplog.text


def test_a_pil_image_is_taken_as_the_model_works_on_it():
    image = Image.new("RGBA", (4, 3), (255, 0, 0, 255))
    assert as_image("image", image, 1, (3, 4, 3))[0, 0, 0].tolist() == [255, 0, 0]
    assert as_image("image", image, 1, (3, 4, 1)).shape == (1, 3, 4, 1)
    assert as_image("image", np.zeros((3, 4), np.uint8), 2, (3, 4, 1)).shape == (2, 3, 4, 1)


@pytest.mark.parametrize("read", [lambda path: read_image(path, 3), read_mask])
def test_files_that_are_no_pictures_are_one_sentence(tmp_path, read):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"text\.png is not a readable image \(it begins as no"):
        read(tmp_path / "text.png")
    Image.new("L", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable image"):
        read(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([[0.0, np.nan]]), "mask has 1 of 2 values that are not finite numbers"),
        (np.array([[0.0, 2.0]]), r"mask has values from 0\.0 to 2\.0; they should lie in \[0, 1\]"),
        (np.array([[-1, 1]]), "mask has values from -1 to 1"),
        (np.array([["a", "b"]]), "mask has dtype <U1; it should be numbers from 0 to 1"),
        (np.zeros(3), r"mask has shape \(3,\); it should be \(2, 3, 1\) or \(4, 2, 3, 1\)"),
        (np.zeros((3, 2, 3, 1)), r"mask has shape \(3, 2, 3, 1\)"),
        (np.zeros((0, 3)), "mask has shape"),
    ],
)
def test_bad_masks_are_one_sentence(mask, message):
    with pytest.raises(ValueError, match=message):
        as_mask(mask, 4, (2, 3))


def test_numbers_are_taken_from_anywhere():
    for value in (3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)):
        assert whole_number("seed", value) == 3 and type(whole_number("seed", value)) is int
    for value in (0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5)):
        assert number("strength", value) == 0.5
    assert number("strength", 1) == 1.0
    assert whole_number("seed", -(2**70)) == -(2**70)


@pytest.mark.parametrize("value", [1.5, "3", None, True, np.float64(3.0), [3], np.array([3])])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="seed = .* should be a whole number"):
        whole_number("seed", value)


@pytest.mark.parametrize("value", ["0.5", None, float("nan"), float("inf"), [0.5], True])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="strength = .* should be a finite number"):
        number("strength", value)


def test_floats_are_finite_and_of_one_shape():
    assert as_floats("latents", jnp.ones((1, 2), jnp.bfloat16), (1, 2)).dtype == np.float32
    with pytest.raises(ValueError, match="latents has 2 of 4 values that are not finite numbers"):
        as_floats("latents", np.array([[1.0, np.nan], [np.inf, 0.0]]), (2, 2))
    with pytest.raises(ValueError, match=r"latents has shape \(2,\); it should be \(1, 2\)"):
        as_floats("latents", np.zeros(2), (1, 2))
    with pytest.raises(ValueError, match="latents has dtype object"):
        as_floats("latents", [None], (1,))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: whole_number("x", x),
        lambda x: number("x", x),
        lambda x: as_floats("x", x, ()),
        lambda x: as_image("x", x, 1, (2, 2, 1)),
    ],
)
def test_traced_values_are_one_sentence(use):
    with pytest.raises(ValueError, match=r"x is traced by JAX .*outside of jax\.jit"):
        jax.jit(use)(1)
