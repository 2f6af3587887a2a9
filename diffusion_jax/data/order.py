"""Which records make up batch k: a pure function of (seed, k), for any k in any order."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Purposes of random numbers: each gets its own stream of the counter-based generator.
_RECORDS, AUGMENT, CAPTION, _BATCHES, CLIP, MASK, TAG = 0, 1, 2, 3, 4, 5, 6


class Order(NamedTuple):
    """The record numbers of every batch; all records of a batch are from one bucket.

    at: step -> (bucket, record numbers int64 [batch_size], -1 for padding).
    steps_per_epoch: how many batches one pass over the records fills, or with padding begins.
    """

    at: Callable[[int], tuple[int, np.ndarray]]
    steps_per_epoch: int


def training_order(
    members: Sequence[np.ndarray], *, batch_size: int, seed: int, shuffle: bool
) -> Order:
    """Order endless full batches, in which the records of all buckets occur equally often.

    Each bucket is an endless stream of shuffled epochs, which is cut into batches: what does not
    fill a batch at the end of an epoch is carried over into the next. Epoch e consists of the
    batches that the streams complete between their e-th and (e+1)-th pass, which for a bucket of n
    records and batches of b are floor((e+1) n / b) - floor(e n / b), and these are shuffled.

    Args:
        members: the record numbers of each bucket, int64 [n], n >= 1.
        batch_size: records per batch.
        seed: the orders are a function of it.
        shuffle: False keeps the order in each bucket, and takes one bucket after the other.
    """
    counts = tuple(len(numbers) for numbers in members)
    rows = np.arange(batch_size)

    def at(step: int) -> tuple[int, np.ndarray]:
        bucket, number = _locate(seed, step, counts, batch_size, shuffle)
        places = _places(seed, bucket, number * batch_size + rows, counts, shuffle=shuffle)
        return bucket, members[bucket][places]

    return Order(at, sum(n // batch_size for n in counts))


def evaluation_order(members: Sequence[np.ndarray], *, batch_size: int) -> Order:
    """Order every record once, one bucket after the other, and pad the last batch of each."""
    batches = [
        (bucket, start)
        for bucket, numbers in enumerate(members)
        for start in range(0, len(numbers), batch_size)
    ]

    def at(step: int) -> tuple[int, np.ndarray]:
        bucket, start = batches[step]
        ids = np.full(batch_size, -1, np.int64)
        chosen = members[bucket][start : start + batch_size]
        ids[: len(chosen)] = chosen
        return bucket, ids

    return Order(at, len(batches))


def uniform(
    seed: int, stream: int, step: int, shape: tuple[int, ...], *, part: int = 0
) -> np.ndarray:
    """Draw float64 in [0, 1), a function of (seed, stream, step, place in the global batch).

    part: a row of the batch, where rows need different amounts of numbers.
    """
    bits = _random_bits(seed, stream, step, math.prod(shape), part=part).reshape(shape)
    return (bits >> np.uint64(11)) * 2.0**-53


def _locate(
    seed: int, step: int, counts: tuple[int, ...], batch_size: int, shuffle: bool
) -> tuple[int, int]:
    """Find the bucket of a batch, and its number in the stream of this bucket."""
    if len(counts) == 1:
        return 0, step
    # Epoch e begins at sum(floor(e n / b)) <= e sum(n) / b, so the guess can only be too early.
    epoch = step * batch_size // sum(counts)
    while sum((epoch + 1) * n // batch_size for n in counts) <= step:
        epoch += 1
    place = step - sum(epoch * n // batch_size for n in counts)
    buckets, numbers = _epoch_batches(seed, epoch, counts, batch_size, shuffle)
    return int(buckets[place]), int(numbers[place])


@functools.lru_cache(maxsize=4)
def _epoch_batches(
    seed: int, epoch: int, counts: tuple[int, ...], batch_size: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    spans = [range(epoch * n // batch_size, (epoch + 1) * n // batch_size) for n in counts]
    buckets = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
    numbers = np.concatenate([np.asarray(span, np.int64) for span in spans])
    if not shuffle:
        return buckets, numbers
    order = np.argsort(_random_bits(seed, _BATCHES, epoch, len(buckets)), kind="stable")
    return buckets[order], numbers[order]


def _places(
    seed: int, bucket: int, positions: np.ndarray, counts: tuple[int, ...], *, shuffle: bool
) -> np.ndarray:
    """Find the member of a bucket, int64, at each position of the bucket's endless stream."""
    epochs, offsets = np.divmod(positions, counts[bucket])
    if not shuffle:
        return offsets
    places = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        places[chosen] = _epoch_orders(seed, int(epoch), counts)[bucket][offsets[chosen]]
    return places


@functools.lru_cache(maxsize=4)
def _epoch_orders(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    # Sorting raw counter-based bits, not Generator.permutation, whose algorithm numpy may change
    # between versions: a resumed run must see the same order.
    return tuple(
        np.argsort(_random_bits(seed, _RECORDS, epoch, n, part=bucket), kind="stable")
        for bucket, n in enumerate(counts)
    )


def _random_bits(seed: int, stream: int, number: int, size: int, *, part: int = 0) -> np.ndarray:
    key = np.array([seed, stream], np.uint64)
    counter = np.array([0, 0, part, number], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(size)
