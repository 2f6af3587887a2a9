"""Shapes of buckets against SDXL's table, and sizes of images from their headers alone."""

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageFile

from diffusion_jax.data import progress
from diffusion_jax.data.buckets import bucket_shapes, fill_buckets, image_sizes

# (height, width) pairs of appendix I of the SDXL paper, the largest area of each height.
SDXL = [
    (512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152),
    (960, 1088), (1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1344, 768), (1472, 704),
    (1600, 640), (1792, 576), (2048, 512),
]  # fmt: skip


def test_shapes_of_sdxl():
    assert list(bucket_shapes((1024, 1024), divisor=64, max_aspect=4.0)) == SDXL
    assert list(bucket_shapes((1024, 1024))) == SDXL[4:-4]
    assert bucket_shapes((1024, 1024), max_aspect=1.0) == ((1024, 1024),)


@pytest.mark.parametrize(
    ("size", "divisor", "max_aspect"),
    [((512, 512), 64, 2.0), ((256, 256), 8, 3.0), ((64, 64), 64, 2.0), ((768, 384), 64, 1.5)],
)
def test_shapes_of_other_areas(size, divisor, max_aspect):
    shapes = bucket_shapes(size, divisor=divisor, max_aspect=max_aspect)
    assert size in shapes
    area = size[0] * size[1]
    for shape in shapes:
        assert not shape[0] % divisor and not shape[1] % divisor
        # Nothing more would fit onto the longer side.
        assert area - divisor * min(shape) < shape[0] * shape[1] <= area
        assert max(shape) <= max_aspect * min(shape) or shape == size
        assert shape[::-1] in shapes or shape == size
    ratios = [height / width for height, width in shapes]
    assert ratios == sorted(ratios)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"divisor": 0}, "bucket_divisor = 0 should be at least 1"),
        ({"max_aspect": 0.5}, "max_aspect = 0.5 should be at least 1"),
        (
            {"divisor": 48},
            r"image_size = \(1024, 1024\) should be a multiple of bucket_divisor = 48",
        ),
    ],
)
def test_bad_options(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        bucket_shapes((1024, 1024), **changes)


def test_nearest_shape_by_brute_force():
    sizes = np.random.default_rng(0).integers(1, 3000, (500, 2))
    shapes, members = fill_buckets(sizes, tuple(SDXL))
    found = np.empty(500, int)
    for bucket, numbers in enumerate(members):
        found[numbers] = bucket
    distance = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log([[h / w for h, w in shapes]]))
    np.testing.assert_array_equal(distance[np.arange(500), found], distance.min(1))
    assert sorted(np.concatenate(members)) == list(range(500))


def test_buckets_that_do_not_fill_a_batch_go_to_their_neighbours():
    counts = {(1, 1): 5, (1, 2): 2, (2, 1): 1, (2, 3): 0, (5, 1): 4}
    sizes = np.array([shape for shape, n in counts.items() for _ in range(n)])
    listed = ((1, 2), (2, 3), (1, 1), (2, 1), (5, 1))
    shapes, members = fill_buckets(sizes, listed)
    assert shapes == ((1, 2), (1, 1), (2, 1), (5, 1))
    assert [len(numbers) for numbers in members] == [2, 5, 1, 4]
    shapes, members = fill_buckets(sizes, listed, at_least=3)
    assert shapes == ((1, 1), (5, 1))
    assert [numbers.tolist() for numbers in members] == [list(range(8)), [8, 9, 10, 11]]
    shapes, members = fill_buckets(sizes, listed, at_least=100)
    assert len(shapes) == 1 and len(members[0]) == 12


def encoded(size, format="PNG", mode="RGB", orientation=None):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new(mode, size[::-1]).save(buffer, format=format, exif=exif)
    return buffer.getvalue()


def test_sizes_come_from_headers(monkeypatch, caplog):
    """As shown, so turned by the orientation of a camera; PIL's load would decode."""
    images = [
        encoded((3, 5)),
        encoded((3, 5), "JPEG", orientation=6),
        encoded((3, 5), "WEBP", orientation=3),
        encoded((3, 5), "PNG", orientation=8),
        encoded((1, 1), "GIF", "P"),
        encoded((7, 2), "PNG", "I;16"),
        np.zeros((4, 9, 3), np.uint8),
        b"no image",
        b"",
        encoded((60, 50))[:45],  # the header is there, the pixels are not
    ]

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(progress, "_CHUNK", 3)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with caplog.at_level(logging.INFO):
        sizes = image_sizes([{"picture": image} for image in images], "picture")
    assert sizes.dtype == np.int32
    expected = [(3, 5), (5, 3), (3, 5), (5, 3), (1, 1), (7, 2), (4, 9), (0, 0), (0, 0), (60, 50)]
    assert [tuple(size) for size in sizes.tolist()] == expected
    assert "reading the sizes of images: 6 of 10" in [m.partition(",")[0] for m in caplog.messages]
    assert caplog.messages[-1].startswith("read the sizes of 10 images in ")
