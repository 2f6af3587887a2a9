"""Batches as a pure function of (seed, step): shuffled for training, in order for evaluation."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from diffusion_jax.data import transforms
from diffusion_jax.data.records import Record, Records, find_keys, make_reader

# Streams of the counter-based generator: what a (seed, number) pair is drawn for.
_ORDER, _AUGMENT = 0, 1


class Batches(NamedTuple):
    """A way to iterate from any step, and the sizes that a progress display needs.

    iterate(start_step) yields this process's rows of global batch start_step, start_step + 1, ...
    as a dict of numpy arrays: "image" float32 [b, h, w, c] in [-1, 1], "index" int64 [b], when the
    data has them "label" int32 [b] and "caption" str [b], and from eval_batches "weight" float32
    [b].
    """

    iterate: Callable[[int], Iterator[dict[str, np.ndarray]]]
    num_examples: int
    steps_per_epoch: int


def make_batches(
    source: Records,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    channels: int = 3,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    crop: str = "center",
    random_flip: bool = False,
    pad: int = 0,
    resize: str = "bicubic",
    cache: bool = False,
    max_corrupt: int = 10,
    image_key: str | None = None,
    label_key: str | None = None,
    caption_key: str | None = None,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches for training: global batch k is a function of (seed, k) and of nothing else.

    The stream of records is one shuffled epoch after the other, cut into batches without regard to
    where an epoch ends, so every record is seen equally often. Of n processes, process p gets the
    p-th of n equal blocks of rows of each batch.

    Args:
        source: what open_source returns, or any sequence of dicts with an image.
        batch_size: records per global batch.
        image_size, channels, crop, resize, pad: see transforms.make_fit.
        seed: of order and augmentations, 0 <= seed < 2**64.
        shuffle: a new order every epoch; else the order of the source.
        repeat: without end; else one epoch, without its last incomplete batch.
        random_flip: mirror each image left to right with probability 1/2.
        cache: keep what comes before the random part as uint8 in memory after its first use.
        max_corrupt: unreadable records to replace by their successors, before it is an error.
        image_key, label_key, caption_key: see records.find_keys.
        num_threads: threads that assemble batches ahead of time; 0 assembles on demand.
        num_workers: processes that decode; they take seconds to start.
        prefetch: batches to keep ready.
        process_index, process_count: this process and how many there are.

    Raises:
        ValueError: empty source, fewer records than a batch, a batch that does not divide by the
            processes, or an option outside its choices; while iterating: too many corrupt images.
    """
    local = _local_rows(len(source), batch_size, process_index, process_count)
    _check_training(len(source), batch_size, seed, num_workers, cache=cache)
    size, fit = transforms.make_fit(
        image_size, channels=channels, crop=crop, resize=resize, pad=pad
    )
    keys = find_keys(source, image_key=image_key, label_key=label_key, caption_key=caption_key)
    read = make_reader(source, fit, keys, cache=cache, max_corrupt=max_corrupt)

    def batch(step: int) -> dict[str, np.ndarray]:
        ids = _record_ids(seed, step * batch_size + local, len(source), shuffle=shuffle)
        flips, tops, lefts = _uniform(seed, step, (batch_size, 3))[local].T
        records = [_read_or_next(read, int(i), len(source)) for i in ids]
        windows = (tops, lefts) if crop == "random" else None
        mirror = flips < 0.5 if random_flip else None
        return {"image": _assemble(records, size, windows, mirror), **_columns(records)}

    per_epoch = len(source) // batch_size
    # A range far beyond any run rather than .repeat(), which would start the step numbers again.
    steps = grain.MapDataset.range(2**60 if repeat else per_epoch).map(batch)
    return Batches(_prefetched(steps, num_threads, num_workers, prefetch), len(source), per_epoch)


def eval_batches(
    source: Records,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    channels: int = 3,
    crop: str = "center",
    pad: int = 0,
    resize: str = "bicubic",
    cache: bool = False,
    max_corrupt: int = 10,
    image_key: str | None = None,
    label_key: str | None = None,
    caption_key: str | None = None,
    num_threads: int = 2,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Batches for evaluation: every record once, in the order of the source, the last one padded.

    Arguments as in make_batches. "weight" is 1 for records and 0 for padding, whose "index" is -1;
    an unreadable image (up to max_corrupt) is black with weight 0. So the mean over the data set is
    sum(weight * value) / sum(weight).

    Raises:
        ValueError: as make_batches, but a batch may be larger than the data set.
    """
    local = _local_rows(len(source), batch_size, process_index, process_count)
    if crop == "random":
        raise ValueError("crop='random' is for training, choose center or stretch for evaluation")
    size, fit = transforms.make_fit(
        image_size, channels=channels, crop=crop, resize=resize, pad=pad
    )
    keys = find_keys(source, image_key=image_key, label_key=label_key, caption_key=caption_key)
    read = make_reader(source, fit, keys, cache=cache, max_corrupt=max_corrupt)
    black = np.zeros((*size, channels), np.uint8)

    def batch(step: int) -> dict[str, np.ndarray]:
        positions = step * batch_size + local
        real = positions < len(source)
        records = [read(int(i)) for i in np.where(real, positions, 0)]
        readable = np.array([record.image is not None for record in records])
        pixels = np.stack([black if record.image is None else record.image for record in records])
        columns = _columns(records)
        columns["index"] = np.where(real, columns["index"], -1)
        weight = (real & readable).astype(np.float32)
        return {"image": transforms.to_float(pixels), **columns, "weight": weight}

    num_steps = math.ceil(len(source) / batch_size)
    steps = grain.MapDataset.range(num_steps).map(batch)
    return Batches(_prefetched(steps, num_threads, 0, prefetch), len(source), num_steps)


def _local_rows(
    num_examples: int, batch_size: int, process_index: int, process_count: int
) -> np.ndarray:
    """Rows of the global batch of one process: a block, as a mesh over processes lays them out."""
    if num_examples == 0:
        raise ValueError("the data set is empty: it has 0 records in this split")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be in 0..{process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    rows = batch_size // process_count
    return np.arange(process_index * rows, (process_index + 1) * rows)


def _check_training(
    num_examples: int, batch_size: int, seed: int, num_workers: int, *, cache: bool
) -> None:
    if num_examples < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is more than the {num_examples} records of the data set, "
            f"choose at most {num_examples}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} must be at least 0 and less than 2**64")
    if cache and num_workers:
        raise ValueError(
            f"cache=True keeps images in this process, but num_workers={num_workers} would decode "
            "in others, choose num_workers=0 or cache=False"
        )


def _record_ids(
    seed: int, positions: np.ndarray, num_examples: int, *, shuffle: bool
) -> np.ndarray:
    """Which record stands at each position of the endless stream of epochs; int64, like
    positions."""
    epochs, offsets = np.divmod(positions, num_examples)
    if not shuffle:
        return offsets
    ids = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = _epoch_order(seed, int(epoch), num_examples)[offsets[chosen]]
    return ids


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # Sorting raw counter-based bits, not Generator.permutation, whose algorithm numpy may change
    # between versions: a resumed run must see the same order.
    return np.argsort(_random_bits(seed, _ORDER, epoch, num_examples), kind="stable")


def _uniform(seed: int, step: int, shape: tuple[int, int]) -> np.ndarray:
    """float64 in [0, 1), a function of (seed, step, place in the global batch)."""
    bits = _random_bits(seed, _AUGMENT, step, math.prod(shape)).reshape(shape)
    return (bits >> np.uint64(11)) * 2.0**-53


def _random_bits(seed: int, stream: int, number: int, size: int) -> np.ndarray:
    key = np.array([seed, stream], np.uint64)
    counter = np.array([0, 0, 0, number], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(size)


def _read_or_next(read: Callable[[int], Record], record_id: int, num_examples: int) -> Record:
    """The record, or for an unreadable one its first readable successor: no state, so resume stays
    exact."""
    for offset in range(num_examples):
        record = read((record_id + offset) % num_examples)
        if record.image is not None:
            return record
    raise ValueError(f"none of the {num_examples} records has a readable image")


def _assemble(
    records: list[Record],
    size: tuple[int, int],
    windows: tuple[np.ndarray, np.ndarray] | None,
    mirror: np.ndarray | None,
) -> np.ndarray:
    """The random part: cut windows [b], [b] in [0, 1) out, flip where mirror [b], scale."""
    images: list[Any] = [record.image for record in records]  # all readable here
    if windows is not None:
        offsets = zip(images, *windows, strict=True)
        images = [transforms.cut(image, size, top, left) for image, top, left in offsets]
    pixels = np.stack(images)
    if mirror is not None:
        pixels[mirror] = pixels[mirror, :, ::-1]
    return transforms.to_float(pixels)


def _columns(records: list[Record]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {
        "index": np.array([record.index for record in records], np.int64)
    }
    if records[0].label is not None:
        columns["label"] = np.array([record.label for record in records], np.int32)
    if records[0].caption is not None:
        columns["caption"] = np.array([record.caption for record in records])
    return columns


def _prefetched(
    steps: grain.MapDataset, num_threads: int, num_workers: int, prefetch: int
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
    if num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only app.run() parses
    options = grain.ReadOptions(
        num_threads=num_threads,
        prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0,
    )

    def iterate(start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must be at least 0")
        batches = steps[start_step:].to_iter_dataset(options)
        if num_workers:
            workers = grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=max(1, prefetch // num_workers)
            )
            batches = batches.mp_prefetch(workers)
        return iter(batches)

    return iterate
