"""Decoding of every pixel layout, and the geometry of pad, resize and crop."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import transforms
from diffusion_jax.data.batches import make_batches


def png(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def gray(value, mode="L", size=(4, 3)):
    return Image.new(mode, size, value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (gray(77), 77),
        (gray((10, 10, 10), "RGB"), 10),
        (gray((10, 10, 10, 255), "RGBA"), 10),
        (gray((10, 10, 10, 0), "RGBA"), 255),  # invisible: what shows is the white behind
        (gray((0, 0, 0, 128), "RGBA"), 127),
        (gray((10, 0), "LA"), 255),
        (gray(1, "1"), 255),
        (Image.fromarray(np.full((3, 4), 65535, np.uint16)), 255),
        (Image.fromarray(np.full((3, 4), 257 * 100 + 200, np.uint16)), 101),
        (Image.fromarray(np.full((3, 4), 65280, np.uint16)), 254),
    ],
)
def test_pixel_layouts(image, expected, channels):
    pixels = transforms.decode(png(image), channels)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 4, channels)
    np.testing.assert_array_equal(pixels, expected)


def test_palette_gives_colours_not_numbers():
    image = gray((200, 30, 40), "RGB").quantize(4)
    assert image.mode == "P"
    np.testing.assert_array_equal(transforms.decode(png(image), 3)[0, 0], [200, 30, 40])


def test_transparent_palette_shows_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.putdata([0, 1])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0)
    np.testing.assert_array_equal(transforms.decode(buffer.getvalue(), 1)[0, :, 0], [255, 9])


def test_cmyk_jpeg():
    pixels = transforms.decode(png(Image.new("CMYK", (2, 2)), "JPEG"), 3)
    np.testing.assert_array_equal(pixels, 255)


def test_orientation_of_a_camera():
    image = Image.fromarray(np.array([[0, 255]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=exif)
    np.testing.assert_array_equal(transforms.decode(buffer.getvalue(), 1)[..., 0], [[0], [255]])


def jpeg(exif, size=(20, 10)):
    """A whole JPEG with these bytes as its EXIF segment."""
    data = png(Image.new("RGB", size, "red"), "JPEG")
    segment = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]


def directory(*entries):
    """A TIFF directory: tag, type, count, and the four bytes of the value or of its place."""
    packed = [struct.pack("<HHI4s", *entry) for entry in entries]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(packed)) + b"".join(packed) + b"\0" * 4


ODD_TAGS = [
    (tag, kind, count)
    for tag in (0x010F, 0x0112, 0x011A, 0x8769, 0x9286, 0xA005)
    for kind in range(14)
    for count in (0, 1, 3, 1000)
]


@pytest.mark.parametrize("turned", [False, True])
def test_exif_tags_of_odd_types_do_no_harm(turned):
    """The orientation counts where it can be read; nothing else of the EXIF data is looked at."""
    turn = [(0x0112, 3, 1, struct.pack("<HH", 6, 0))] if turned else []
    for tag, kind, count in ODD_TAGS:
        if tag == 0x0112 and (turned or kind in (1, 3, 4, 6, 8, 9, 11)):
            continue  # a number, which may be read as one
        odd = (tag, kind, count, struct.pack("<f", 1.0))
        image = jpeg(directory(*sorted([odd, *turn])))
        expected = (20, 10) if turned else (10, 20)
        assert transforms.decode(image, 3).shape == (*expected, 3), (tag, kind, count)
        assert transforms.size_of(image) == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_of_every_format(format, orientation):
    """The corner that is lit is where the definition of the tag says, and the size fits."""
    image = Image.new("L", (64, 32))
    image.paste(255, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format, exif=exif)
    pixels = transforms.decode(buffer.getvalue(), 1)[..., 0]
    assert pixels.shape == ((32, 64) if orientation < 5 else (64, 32))
    top, left = pixels[:8].max() > 128, pixels[:, :8].max() > 128
    # EXIF 2.3, tag 274: where the first row and the first column of the file are seen.
    assert (top, left) == [
        (True, True), (True, False), (False, False), (False, True),
        (True, True), (True, False), (False, False), (False, True),
    ][orientation - 1]  # fmt: skip
    assert transforms.size_of(buffer.getvalue()) == pixels.shape


def test_an_error_that_nobody_foresaw_is_an_unreadable_image(monkeypatch):
    def fail(*_):
        raise AssertionError("inside of a decoder")

    monkeypatch.setattr(Image, "open", fail)
    for read in (transforms.size_of, lambda image: transforms.decode(image, 3)):
        with pytest.raises(transforms.CorruptImageError, match="AssertionError: inside"):
            read(b"")


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_arrays(shape):
    pixels = transforms.decode(np.full(shape, 255, np.uint8), 3)
    assert pixels.shape == (5, 7, 3)
    np.testing.assert_array_equal(pixels, 255)


def test_arrays_of_other_types_are_refused():
    with pytest.raises(TypeError, match="array of float32"):
        transforms.decode(np.zeros((2, 2, 3), np.float32), 3)
    with pytest.raises(TypeError, match=r"shape \[2, 2, 5\]"):
        transforms.decode(np.zeros((2, 2, 5), np.uint8), 3)


@pytest.mark.parametrize("keep", [0, 10, 60, 0.9])
def test_damaged_bytes(keep):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for format in ("PNG", "JPEG"):
        data = png(Image.fromarray(noise), format)
        cut = data[: int(keep * len(data)) if isinstance(keep, float) else keep]
        with pytest.raises(transforms.CorruptImageError, match="not a readable image") as caught:
            transforms.decode(cut, 3)
        assert "0x" not in str(caught.value)


def make(image_size, **changes):
    defaults = {"channels": 3, "crop": "center", "resize": "bicubic", "pad": 0}
    fit = transforms.make_fit(**{**defaults, **changes})
    return lambda image: fit(image, transforms.check_size(image_size)).pixels


@pytest.mark.parametrize("old", [(1, 1), (8, 8), (3, 9), (9, 3), (17, 16)])
@pytest.mark.parametrize("size", [8, (4, 6)])
@pytest.mark.parametrize("crop", ["center", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_becomes_the_asked_size(old, size, crop, channels):
    pixels = make(size, crop=crop, channels=channels)(np.full((*old, 3), 99, np.uint8))
    height, width = (size, size) if isinstance(size, int) else size
    assert pixels.shape == (height, width, channels)
    np.testing.assert_array_equal(pixels, 99)


def test_center_crop_keeps_the_middle():
    image = np.zeros((4, 12, 1), np.uint8)
    image[:, 4:8] = 255
    np.testing.assert_array_equal(make(4, channels=1)(image), 255)


def test_shrinking_is_antialiased():
    stripes = np.tile(np.array([0, 255], np.uint8), (32, 16))[..., None]
    for resize in ("bicubic", "area", "bilinear", "lanczos"):
        small = make(8, channels=1, resize=resize)(stripes)
        assert abs(int(small[4, 4, 0]) - 127) < 16
    np.testing.assert_array_equal(make(16, channels=1, resize="area")(stripes), 128)


def test_pad_keeps_the_pixels_and_repeats_the_edge():
    image = np.arange(9, dtype=np.uint8).reshape(3, 3, 1) * 10
    padded = make(7, channels=1, pad=2)(image)
    np.testing.assert_array_equal(padded[2:-2, 2:-2], image)
    assert padded[0, 0, 0] == 0
    assert padded[-1, -1, 0] == 80


def test_random_crop_can_reach_both_ends():
    image = np.arange(10, dtype=np.uint8).reshape(1, 10, 1)
    places = np.stack([np.zeros(50), np.linspace(0, 0.9999, 50)], axis=1)
    corners = transforms.corners(np.array([[1, 10]] * 50), (1, 4), places).tolist()
    windows = [transforms.cut(image, (1, 10), (1, 4), corner, "area") for corner in corners]
    assert {int(window[0, 0, 0]) for window in windows} == set(range(7))
    assert {window.shape for window in windows} == {(1, 4, 1)}


@pytest.mark.parametrize("corner", [(0, 0), (0, 37), (0, 992), (9, 500)])
def test_very_wide_images_are_cut_before_they_are_resized(corner):
    """The same pixels as of the whole image resized, to the rounding of one level."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 400, 3), dtype=np.uint8)
    resized = (10, 1000) if corner[0] == 0 else (19, 1000)
    whole = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BICUBIC))
    shown = transforms.cut(image, resized, (10, 8), corner, "bicubic")
    top, left = corner
    wanted = whole[top : top + 10, left : left + 8].astype(int)
    assert np.abs(shown - wanted).max() <= 1


def test_memory_of_a_strip_is_that_of_a_window(monkeypatch):
    """4,000 x 16 pixels would cover 64 x 64 as 16,000 x 64."""
    sizes, resize = [], Image.Image.resize

    def spy(self, size, *rest):
        sizes.append(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", spy)
    strip = np.tile(np.arange(4000, dtype=np.uint8)[None, :, None], (16, 1, 3))
    for crop in ("center", "random"):
        fit = transforms.make_fit(channels=3, crop=crop, resize="area", pad=0)
        fitted = fit(strip, (64, 64))
        assert fitted.resized_size == (64, 16000)
        assert fitted.pixels.size <= strip.size
    batch = next(
        make_batches([{"image": strip}], batch_size=1, image_size=64, crop="random").iterate(0)
    )
    assert max(sizes) <= (64, 64)
    left = batch["crop_top_left"][0, 1]
    seen = (batch["image"][0, 0, :, 0] + 1) * 127.5
    np.testing.assert_allclose(seen, np.arange(left, left + 64) // 4 % 256, atol=1)


def test_range_of_floats():
    floats = transforms.to_float(np.array([0, 255, 128], np.uint8))
    assert floats.dtype == np.float32
    assert floats[0] == -1 and floats[1] == 1
    assert floats[2] == pytest.approx(128 / 127.5 - 1, abs=1e-7)


def test_opacity_is_read_upright_and_is_full_where_nothing_says_so():
    alpha = np.array([[0, 128, 255]], np.uint8)
    rgba = Image.fromarray(np.concatenate([np.zeros((1, 3, 3), np.uint8), alpha[..., None]], -1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    stored = io.BytesIO()
    rgba.save(stored, "PNG", exif=exif)
    found = transforms.decode_alpha(stored.getvalue())
    assert found.shape == (1, 3, 1) and found.ravel().tolist() == [255, 128, 0]
    assert transforms.decode_alpha(np.zeros((2, 3, 3), np.uint8)).tolist() == [[[255]] * 3] * 2
    with pytest.raises(transforms.CorruptImageError, match="not a readable image"):
        transforms.decode_alpha(b"no image")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_what_was_turned_upright_is_not_turned_again(format):
    alpha = np.array([[0, 128, 255]], np.uint8)
    pixels = np.concatenate([np.full((1, 3, 3), 80, np.uint8), alpha[..., None]], -1)
    exif, stored = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(stored, format, exif=exif, **{"lossless": True, "exact": True})
    once = transforms.upright(stored.getvalue())
    assert once.mode == "RGBA" and once.size == (1, 3)
    np.testing.assert_array_equal(np.asarray(once)[:, 0, 3], alpha[0])
    np.testing.assert_array_equal(transforms.upright(once), once)
    np.testing.assert_array_equal(
        transforms.decode(once, 3), transforms.decode(stored.getvalue(), 3)
    )


def test_16_bits_are_read_as_8_with_the_colours_kept():
    """White stays white, and the middle stays the middle."""
    grey = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    assert np.asarray(transforms.upright(png(grey))).tolist() == [[0, 128, 255]]
    with pytest.raises(transforms.CorruptImageError, match="floating-point pixels"):
        transforms.upright(Image.fromarray(np.zeros((2, 2), np.float32)))
