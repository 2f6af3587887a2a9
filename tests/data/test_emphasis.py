"""Records come as often as they say, in every order of batches, and bring their weights along."""

import collections
import itertools

import numpy as np
import pytest

from diffusion_jax.data.batches import eval_batches, make_batches
from diffusion_jax.data.emphasis import ALIKE, Emphasis, read_emphasis, with_weights

REPEATS = [1, 3, 2, 5, 1]
WEIGHTS = [1.0, 0.5, 0.0, 2.0, 0.25]
SOURCE = [
    {"image": np.full((6, 6, 3), number, np.uint8), "times": times, "counts": weight}
    for number, (times, weight) in enumerate(zip(REPEATS, WEIGHTS, strict=True))
]
OPTIONS = dict(batch_size=4, image_size=6, repeats_key="times", weight_key="counts")


def numbers(batches, count, start=0):
    taken = itertools.islice(batches.iterate(start), count)
    return np.concatenate([batch["index"] for batch in taken])


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_each_record_as_often_as_it_says(shuffle):
    batches = make_batches(SOURCE, seed=1, shuffle=shuffle, **OPTIONS)
    assert batches.steps_per_epoch == 3 and batches.num_examples == 5
    epochs = numbers(batches, 9).reshape(3, 12)
    for epoch in epochs:
        assert collections.Counter(epoch.tolist()) == dict(enumerate(REPEATS))
    assert (epochs[0] != epochs[1]).any() == shuffle
    np.testing.assert_array_equal(numbers(batches, 4, start=5), epochs.reshape(-1)[20:36])


def test_processes_share_the_repeated_order():
    whole = numbers(make_batches(SOURCE, seed=1, **OPTIONS), 3).reshape(3, 2, 2)
    for process in range(2):
        part = make_batches(SOURCE, seed=1, process_index=process, process_count=2, **OPTIONS)
        np.testing.assert_array_equal(numbers(part, 3).reshape(3, 2), whole[:, process])


def test_a_batch_may_be_as_large_as_an_epoch_with_its_repeats():
    batches = make_batches(SOURCE, **OPTIONS | dict(batch_size=12))
    assert collections.Counter(numbers(batches, 1).tolist()) == dict(enumerate(REPEATS))
    with pytest.raises(ValueError, match="batch_size = 13 should be at most 12"):
        make_batches(SOURCE, **OPTIONS | dict(batch_size=13))


def test_weights_belong_to_their_records():
    batch = next(make_batches(SOURCE, seed=2, **OPTIONS).iterate(0))
    assert batch["loss_weight"].dtype == np.float32
    np.testing.assert_array_equal(batch["loss_weight"], np.array(WEIGHTS)[batch["index"]])
    # Evaluation sees each record once, and padding has the weight 1 beside "weight" 0.
    found = list(eval_batches(SOURCE, **OPTIONS).iterate(0))
    assert [batch["index"].tolist() for batch in found] == [[0, 1, 2, 3], [4, -1, -1, -1]]
    np.testing.assert_array_equal(found[1]["loss_weight"], [0.25, 1.0, 1.0, 1.0])
    plain = next(make_batches(SOURCE, batch_size=4, image_size=6).iterate(0))
    assert "loss_weight" not in plain


def test_buckets_count_repeats_before_they_are_joined():
    """Two wide images fill no batch of four, but do when each comes twice."""
    shapes = [(8, 16)] * 2 + [(16, 8)] * 4
    source = [{"image": np.zeros((*shape, 3), np.uint8), "times": 2} for shape in shapes]
    options = dict(image_size=8, buckets=True, bucket_divisor=4, max_aspect=4.0, batch_size=4)
    assert len(make_batches(source, **options).shapes) == 1
    batches = make_batches(source, repeats_key="times", **options)
    assert len(batches.shapes) == 2 and batches.steps_per_epoch == 3
    assert collections.Counter(numbers(batches, 3).tolist()) == dict.fromkeys(range(6), 2)


def test_without_emphasis_nothing_changes():
    members = (np.arange(3), np.arange(3, 5))
    assert ALIKE.repeated(members) is members and ALIKE.count(5) == 5
    assert read_emphasis(SOURCE) == ALIKE
    batch = {"index": np.arange(2)}
    assert with_weights(lambda step: batch, None, 0) is batch
    found = Emphasis(np.array([2, 1, 1, 3, 1])).repeated(members)
    assert [part.tolist() for part in found] == [[0, 0, 1, 2], [3, 3, 3, 4]]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("repeats_key", 0, "'x': record 2 has 0 and should have a whole number between 1 and"),
        ("repeats_key", 1.5, "'x': record 2 has 1.5 and should have a whole number between 1 and"),
        ("repeats_key", 2**31, "'x': record 2 has 2.14748e.09 and should have a whole"),
        ("weight_key", -0.5, "'x': record 2 has -0.5 and should have a number between 0 and"),
        ("weight_key", np.nan, "'x': record 2 has nan and should have a number between 0 and"),
        ("weight_key", "heavy", "'x': record 2 has nan and should have a number between 0 and"),
    ],
)
def test_bad_numbers_are_told_with_their_record(key, value, sentence):
    source = [{"x": 1}, {"x": 2}, {"x": value}]
    with pytest.raises(ValueError, match=f"{key} = {sentence}"):
        read_emphasis(source, **{key: "x"})


def test_a_feature_that_is_not_there():
    with pytest.raises(ValueError, match="repeats_key = 'often' is no feature; choose from image"):
        make_batches(SOURCE, **OPTIONS | dict(repeats_key="often"))
