"""Which records make up batch k: a pure function of (seed, k) that can be asked for any k."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Streams of the counter-based generator: what a (seed, number) pair is drawn for.
_RECORDS, AUGMENT, CAPTION, _BATCHES = 0, 1, 2, 3


class Order(NamedTuple):
    """Batches of record numbers, each batch out of one bucket.

    at(step) -> (bucket, ids): ids int64 [batch_size], -1 for padding.
    steps_per_epoch: batches that one pass over the records fills; with padding, all of them.
    """

    at: Callable[[int], tuple[int, np.ndarray]]
    steps_per_epoch: int


def training_order(
    members: Sequence[np.ndarray], *, batch_size: int, seed: int, shuffle: bool
) -> Order:
    """Full batches without end, in which the records of all buckets occur equally often.

    Each bucket is an endless stream of shuffled epochs, cut into batches without regard to where
    an epoch ends: what does not fill a batch is carried over. Epoch e is made of the batches that
    the streams complete between their e-th and (e+1)-th pass, floor((e+1) n / b) - floor(e n / b)
    of a bucket of n records, and they are shuffled among each other.

    Args:
        members: of each bucket the record numbers, int64 [n], n >= 1.
        shuffle: else each bucket in its order, and in an epoch one bucket after the other.
    """
    counts = tuple(len(numbers) for numbers in members)
    rows = np.arange(batch_size)

    def at(step: int) -> tuple[int, np.ndarray]:
        bucket, number = _locate(seed, step, counts, batch_size, shuffle)
        places = _places(seed, bucket, number * batch_size + rows, counts, shuffle=shuffle)
        return bucket, members[bucket][places]

    return Order(at, sum(n // batch_size for n in counts))


def evaluation_order(members: Sequence[np.ndarray], *, batch_size: int) -> Order:
    """Every record once, bucket after bucket in their order, the last batch of each padded."""
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


def uniform(seed: int, stream: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [0, 1), a function of (seed, stream, step, place in the global batch)."""
    bits = _random_bits(seed, stream, step, math.prod(shape)).reshape(shape)
    return (bits >> np.uint64(11)) * 2.0**-53


def _locate(
    seed: int, step: int, counts: tuple[int, ...], batch_size: int, shuffle: bool
) -> tuple[int, int]:
    """The bucket of a batch, and which batch of the stream of this bucket it is."""
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
    """Which member of a bucket stands at each position of its endless stream; int64, like
    positions."""
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
