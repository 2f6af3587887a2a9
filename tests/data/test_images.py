"""What reads the images of a source: options are checked, bad records are passed over."""

import numpy as np
import pytest

from diffusion_jax.data.images import ImageOptions, Images, open_images
from diffusion_jax.data.records import Record


def records(*sides):
    return [{"image": np.full((h, w, 3), n, np.uint8)} for n, (h, w) in enumerate(sides)]


def test_every_record_has_the_one_shape_without_buckets():
    images = open_images(records((8, 8), (4, 16), (16, 4)), ImageOptions((6, 4)))
    assert images.shapes == ((6, 4),) and [list(m) for m in images.members] == [[0, 1, 2]]
    record = images.read(2, (6, 4))
    assert record.image.shape == (6, 4, 3) and (record.image == 2).all()
    assert open_images(records((8, 8)), ImageOptions(5)).shapes == ((5, 5),)


def test_buckets_part_wide_from_high():
    options = ImageOptions(32, buckets=True, bucket_divisor=8)
    images = open_images(records((32, 32), (24, 48), (48, 24), (36, 36)), options)
    assert sorted(n for member in images.members for n in member) == [0, 1, 2, 3]
    shape_of = {n: s for s, m in zip(images.shapes, images.members, strict=True) for n in m}
    assert shape_of[0] == shape_of[3] == (32, 32)
    assert shape_of[1][0] < shape_of[1][1] and shape_of[2][0] > shape_of[2][1]


def reader(*readable):
    def read(number, size):
        image = np.full((*size, 1), number, np.uint8) if number in readable else None
        return Record(image, size, size, None, None, number)

    return Images(read, ((2, 2),), (np.arange(3), np.arange(3, 5)))


def test_an_unreadable_record_gives_way_to_the_next_around_the_end():
    assert reader(1, 4).read_or_next(1, (2, 2)).image[0, 0, 0] == 1
    assert reader(1, 4).read_or_next(2, (2, 2)).image[0, 0, 0] == 4
    assert reader(1).read_or_next(4, (2, 2)).image[0, 0, 0] == 1
    with pytest.raises(ValueError, match="none of the 5 records has a readable image"):
        reader().read_or_next(0, (2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ImageOptions(0), "image_size"),
        (ImageOptions(8, crop="centre"), "crop = 'centre'"),
        (ImageOptions(8, resize="cubic"), "resize = 'cubic'"),
        (ImageOptions(8, channels=2), "channels = 2"),
        (ImageOptions(8, label_key="kind"), "label_key = 'kind'"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        open_images(records((8, 8)), options)
