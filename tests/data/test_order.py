"""Every record equally often, every batch out of one bucket, and any batch without those before."""

import numpy as np
import pytest

from diffusion_jax.data.order import evaluation_order, training_order

# Numbers of records of five buckets, with records numbered through; a batch of 4 divides only one.
COUNTS = (7, 4, 13, 5, 9)
MEMBERS = np.split(np.arange(sum(COUNTS)) + 100, np.cumsum(COUNTS)[:-1])


def order(members=MEMBERS, **changes):
    return training_order(members, **{"batch_size": 4, "seed": 3, "shuffle": True, **changes})


def batches_before(epoch, counts=COUNTS):
    return sum(epoch * n // 4 for n in counts)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_record_equally_often(shuffle):
    at = order(shuffle=shuffle).at
    steps = [at(step) for step in range(batches_before(12))]
    for bucket, ids in steps:
        assert set(ids) <= set(MEMBERS[bucket])
    for epoch in (1, 5, 12):
        seen = np.concatenate([ids for _, ids in steps[: batches_before(epoch)]])
        times = np.bincount(seen - 100, minlength=sum(COUNTS))
        assert set(times) <= {epoch - 1, epoch}
        # What is not there yet is less than a batch per bucket.
        assert (times == epoch - 1).sum() == sum(epoch * n % 4 for n in COUNTS)


def test_an_epoch_completes_the_batches_of_each_bucket_in_a_new_order():
    at = order().at
    epochs = [
        [at(step)[0] for step in range(batches_before(e), batches_before(e + 1))] for e in range(8)
    ]
    for e, buckets in enumerate(epochs):
        expected = [(e + 1) * n // 4 - e * n // 4 for n in COUNTS]
        assert np.bincount(buckets, minlength=5).tolist() == expected
    assert len({tuple(buckets) for buckets in epochs}) == 8
    assert all(buckets != sorted(buckets) for buckets in epochs)


def test_buckets_of_one_length_have_orders_of_their_own():
    members = (np.arange(16), np.arange(16) + 16)
    at = order(members).at
    streams = [
        np.concatenate([ids % 16 for bucket, ids in map(at, range(8)) if bucket == wanted])
        for wanted in (0, 1)
    ]
    assert sorted(streams[0]) == sorted(streams[1]) == list(range(16))
    assert streams[0].tolist() != streams[1].tolist()


def test_random_access_gives_the_same_and_far_steps_cost_nothing():
    forwards, backwards = order().at, order().at
    expected = [forwards(step) for step in range(40)]
    for step in reversed(range(40)):
        bucket, ids = backwards(step)
        assert bucket == expected[step][0]
        np.testing.assert_array_equal(ids, expected[step][1])
    assert len(forwards(10**15)[1]) == 4


def test_order_of_buckets_is_pinned():
    """A checkpoint of today must find the same batches with later versions of numpy and grain."""
    at = order().at
    assert [(bucket, ids.tolist()) for bucket, ids in map(at, (0, 1, 20))] == PINNED


PINNED = [(3, [128, 126, 127, 124]), (4, [130, 137, 132, 135]), (0, [100, 105, 106, 100])]


def test_without_shuffle_one_bucket_after_the_other():
    at = order(shuffle=False).at
    assert [at(step)[0] for step in range(8)] == [0, 1, 2, 2, 2, 3, 4, 4]
    assert at(3)[1].tolist() == [115, 116, 117, 118]


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_seeds(seed):
    assert order(seed=seed).at(5)[1].tolist() != order(seed=1).at(5)[1].tolist()


def test_steps_of_an_epoch_are_full_batches():
    assert order().steps_per_epoch == batches_before(1) == 8


def test_evaluation_pads_the_last_batch_of_each_bucket():
    at, steps = evaluation_order(MEMBERS, batch_size=4)
    assert steps == 2 + 1 + 4 + 2 + 3
    found = [at(step) for step in range(steps)]
    ids = np.concatenate([ids for _, ids in found])
    assert ids[ids >= 0].tolist() == (np.arange(sum(COUNTS)) + 100).tolist()
    assert [bucket for bucket, _ in found] == [0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4]
    assert found[1][1].tolist() == [104, 105, 106, -1]
