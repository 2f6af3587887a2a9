"""Numbers of records and frames: exactly as the frames shown have them, or a sentence."""

import itertools

import numpy as np
import pytest

from diffusion_jax.data.batches import eval_batches, make_batches
from diffusion_jax.data.numbers import NumberNames, numbers_of

NAMES = NumberNames(("score", "pair"), ("angle", "place"))
RECORD = {"score": 3, "pair": [1, 2], "angle": [0, 10, 20, 30], "place": np.zeros((4, 2))}


def clip(number):
    """Frame t has the value t and the angle 100 * number + t."""
    frames = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    return {"video": frames, "angle": 100.0 * number + np.arange(6), "score": number}


def test_rows_of_numbers():
    found = numbers_of(NAMES, RECORD, 4, [3, 1], "it")
    assert {name: rows.shape for name, rows in found.items()} == {
        "score": (1,), "pair": (2,), "angle": (2, 1), "place": (2, 2)
    }  # fmt: skip
    assert found["angle"].ravel().tolist() == [30, 10] and found["angle"].dtype == np.float32
    assert NAMES.among({"pair": 0, "angle": 0}) == NumberNames(("pair",), ("angle",))


@pytest.mark.parametrize("make", [make_batches, eval_batches])
def test_a_clip_has_the_numbers_of_its_frames(make):
    options = {"batch_size": 4, "image_size": 4, "num_frames": 3, "frame_stride": 2}
    columns = {"frame_columns": ("angle", "absent"), "number_columns": ("score",)}
    batches = make([clip(n) for n in range(4)], **options, **columns)
    starts = set()
    for batch in itertools.islice(batches.iterate(0), 1 if make is eval_batches else 8):
        shown = np.rint((batch["image"][:, :, 0, 0, 0] + 1) * 127.5)
        assert batch["angle"].shape == (4, 3, 1) and "absent" not in batch
        np.testing.assert_array_equal(batch["angle"][..., 0], 100 * batch["index"][:, None] + shown)
        np.testing.assert_array_equal(batch["score"][:, 0], batch["index"])
        starts |= {*shown[:, 0]}
    assert starts == ({1} if make is eval_batches else {0, 1})


def test_what_a_batch_makes_itself_is_not_replaced():
    images = [{"image": np.zeros((4, 4, 3), np.uint8), "original_size": [9.0, 9.0]}] * 2
    batches = make_batches(images, batch_size=2, image_size=4, number_columns=("original_size",))
    assert next(batches.iterate(0))["original_size"].tolist() == [[4, 4], [4, 4]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"angle": [0, 1, 2]}, "record 7: angle has 3 numbers and should have 4, one for each fr"),
        ({"angle": 5}, "angle has 1 numbers and should have 4"),
        ({"score": float("nan")}, "record 7: score = nan should be finite numbers"),
        ({"score": "x"}, "score = 'x' should be finite numbers"),
        ({"pair": [1, None]}, "pair = .1, None. should be finite numbers"),
    ],
)
def test_what_is_no_number_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        numbers_of(NAMES, RECORD | fields, 4, [0], "record 7")
