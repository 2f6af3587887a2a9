"""Batches as a pure function of (seed, step): shuffled for training, in order for evaluation."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from diffusion_jax.data import transforms
from diffusion_jax.data.buckets import BucketRule, sort_into_buckets
from diffusion_jax.data.order import (
    AUGMENT,
    CAPTION,
    Order,
    evaluation_order,
    training_order,
    uniform,
)
from diffusion_jax.data.records import Record, Records, find_keys, make_reader

MIDDLE = np.array([[0.5, 0.5]])


class Batches(NamedTuple):
    """A way to iterate from any step, and the sizes that a progress display needs.

    iterate(start_step) yields this process's rows of global batch start_step, start_step + 1, ...
    as a dict of numpy arrays:
        "image": float32 [b, h, w, c] in [-1, 1].
        "original_size": int32 [b, 2], (height, width) of the stored image, upright.
        "crop_top_left": int32 [b, 2], (top, left) of the window in the resized image; of a mirrored
            image, in the mirrored one.
        "target_size": int32 [b, 2], (h, w) of the batch's images.
        "index": int64 [b], record numbers.
        "label": int32 [b] and "caption": str [b], when the data have them.
        "weight": float32 [b], from eval_batches.
    shapes: every (h, w) that occurs: one, or with buckets one per bucket.

    The sizes are the micro-conditioning of SDXL (Podell et al. 2023, section 2.2).
    """

    iterate: Callable[[int], Iterator[dict[str, np.ndarray]]]
    num_examples: int
    steps_per_epoch: int
    shapes: tuple[tuple[int, int], ...]


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
    buckets: bool = False,
    bucket_divisor: int = 64,
    max_aspect: float = 2.0,
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

    The stream of records (of each bucket) is one shuffled epoch after the other, cut into batches
    without regard to where an epoch ends, so every record is seen equally often: training_order.

    Args:
        source: what open_source returns, or any sequence of dicts with an image. Of several
            captions each batch draws one.
        batch_size: records per global batch; of n processes, each gets one of n blocks of rows.
        image_size, channels, crop, resize, pad: see transforms.fit.
        seed: of order and augmentations, 0 <= seed < 2**64.
        shuffle: a new order every epoch; else the order of the source.
        repeat: without end; else one epoch, without its last incomplete batch (of each bucket).
        random_flip: mirror each image left to right with probability 1/2.
        buckets, bucket_divisor, max_aspect: images of similar proportions go together, in shapes
            of the area of image_size that fill a batch: buckets.fill_buckets, bucket_shapes.
        cache: keep what comes before the random part as uint8 in memory after its first use.
        max_corrupt: unreadable records to replace by their successors, before it is an error.
        image_key, label_key, caption_key: see records.find_keys.
        num_threads, num_workers, prefetch: threads (0: none) or processes that keep batches ready.

    Raises:
        ValueError: empty source, fewer records than a batch, a batch that does not divide by the
            processes, or an option outside its choices; while iterating: too many corrupt images.
    """
    local = local_rows(len(source), batch_size, process_index, process_count)
    check_training(len(source), batch_size, seed, num_workers, cache=cache)
    size = transforms.check_size(image_size)
    fit = transforms.make_fit(channels=channels, crop=crop, resize=resize, pad=pad)
    keys = find_keys(source, image_key=image_key, label_key=label_key, caption_key=caption_key)
    read = make_reader(source, fit, keys, cache=cache, max_corrupt=max_corrupt)
    rule = BucketRule(bucket_divisor, max_aspect, pad) if buckets else None
    shapes, members = sort_into_buckets(source, keys.image, size, rule, at_least=batch_size)
    plan = training_order(members, batch_size=batch_size, seed=seed, shuffle=shuffle)
    rows = _Rows(plan, shapes, local, batch_size, len(source), read)
    make = functools.partial(_training_batch, rows, seed, crop == "random", random_flip)
    # A range far beyond any run rather than .repeat(), which would start the step numbers again.
    steps = grain.MapDataset.range(2**60 if repeat else plan.steps_per_epoch).map(make)
    iterate = prefetched(steps, num_threads, num_workers, prefetch)
    return Batches(iterate, len(source), plan.steps_per_epoch, shapes)


def eval_batches(
    source: Records,
    *,
    batch_size: int,
    image_size: int | tuple[int, int],
    channels: int = 3,
    crop: str = "center",
    pad: int = 0,
    resize: str = "bicubic",
    buckets: bool = False,
    bucket_divisor: int = 64,
    max_aspect: float = 2.0,
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
    sum(weight * value) / sum(weight). Of several captions it is the first. With buckets, one bucket
    comes after the other and the last batch of each is padded.

    Raises:
        ValueError: as make_batches, but a batch may be larger than the data set.
    """
    local = local_rows(len(source), batch_size, process_index, process_count)
    if crop == "random":
        raise ValueError("crop='random' is for training, choose center or stretch for evaluation")
    size = transforms.check_size(image_size)
    fit = transforms.make_fit(channels=channels, crop=crop, resize=resize, pad=pad)
    keys = find_keys(source, image_key=image_key, label_key=label_key, caption_key=caption_key)
    read = make_reader(source, fit, keys, cache=cache, max_corrupt=max_corrupt)
    rule = BucketRule(bucket_divisor, max_aspect, pad) if buckets else None
    shapes, members = sort_into_buckets(source, keys.image, size, rule)
    plan = evaluation_order(members, batch_size=batch_size)
    rows = _Rows(plan, shapes, local, batch_size, len(source), read)
    steps = grain.MapDataset.range(plan.steps_per_epoch).map(
        functools.partial(_evaluation_batch, rows, channels)
    )
    iterate = prefetched(steps, num_threads, 0, prefetch)
    return Batches(iterate, len(source), plan.steps_per_epoch, shapes)


class _Rows(NamedTuple):
    """What a batch is made from: which records, in which shape, and how to read one."""

    plan: Order
    shapes: tuple[tuple[int, int], ...]
    local: np.ndarray
    batch_size: int
    num_examples: int
    read: Callable[[int, tuple[int, int]], Record]


def _training_batch(
    rows: _Rows, seed: int, random_crop: bool, random_flip: bool, step: int
) -> dict[str, np.ndarray]:
    bucket, ids = rows.plan.at(step)
    size = rows.shapes[bucket]
    records = [read_or_next(rows.read, int(i), size, rows.num_examples) for i in ids[rows.local]]
    draws = uniform(seed, AUGMENT, step, (rows.batch_size, 3))[rows.local]
    mirror = draws[:, 0] < 0.5 if random_flip else np.zeros(len(records), bool)
    geometry, windows = size_columns(records, size, draws[:, 1:] if random_crop else MIDDLE, mirror)
    images: list[Any] = [record.image for record in records]  # all readable here
    if random_crop:
        spans = zip(images, windows.tolist(), strict=True)
        images = [image[y : y + size[0], x : x + size[1]] for image, (y, x) in spans]
    pixels = np.stack(images)
    if random_flip:
        pixels[mirror] = pixels[mirror, :, ::-1]
    picks = np.zeros(len(records))
    if any(record.captions is not None and len(record.captions) > 1 for record in records):
        picks = uniform(seed, CAPTION, step, (rows.batch_size,))[rows.local]
    return {"image": transforms.to_float(pixels), **geometry, **record_columns(records, picks)}


def _evaluation_batch(rows: _Rows, channels: int, step: int) -> dict[str, np.ndarray]:
    bucket, ids = rows.plan.at(step)
    size = rows.shapes[bucket]
    local = ids[rows.local]
    real = local >= 0
    # Padding is another copy of a record of this batch, whose first row always is one.
    records = [rows.read(int(i), size) for i in np.where(real, local, ids[0])]
    readable = np.array([record.image is not None for record in records])
    black = np.zeros((*size, channels), np.uint8)
    pixels = np.stack([black if record.image is None else record.image for record in records])
    geometry, _ = size_columns(records, size, MIDDLE, np.zeros(len(records), bool))
    columns = record_columns(records, np.zeros(len(records)))
    columns["index"] = np.where(real, columns["index"], -1)
    weight = (real & readable).astype(np.float32)
    return {"image": transforms.to_float(pixels), **geometry, **columns, "weight": weight}


def local_rows(
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


def check_training(
    num_examples: int, batch_size: int, seed: int, num_workers: int, *, cache: bool
) -> None:
    """ValueError unless an epoch fills a batch and the options go together."""
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


def read_or_next(
    read: Callable[[int, tuple[int, int]], Record],
    record_id: int,
    size: tuple[int, int],
    num_examples: int,
) -> Record:
    """The record, or for an unreadable one its first readable successor: no state, so resume stays
    exact."""
    for offset in range(num_examples):
        record = read((record_id + offset) % num_examples, size)
        if record.image is not None:
            return record
    raise ValueError(f"none of the {num_examples} records has a readable image")


def size_columns(
    records: list[Record], size: tuple[int, int], places: np.ndarray, mirror: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The size micro-conditioning of a batch, and the (top, left) [b, 2] to cut its windows at.

    A mirrored image counts as mirrored before it was cut, so that its left is that of what is seen.
    """
    resized = np.array([record.resized_size for record in records])
    windows = transforms.corners(resized, size, places)
    seen = windows.astype(np.int32)
    seen[mirror, 1] = (resized[:, 1] - size[1] - windows[:, 1])[mirror]
    geometry = {
        "original_size": np.array([record.original_size for record in records], np.int32),
        "crop_top_left": seen,
        "target_size": np.tile(np.array(size, np.int32), (len(records), 1)),
    }
    return geometry, windows


def record_columns(records: list[Record], picks: np.ndarray) -> dict[str, np.ndarray]:
    """The other columns; picks [b] in [0, 1) choose among the captions of each record."""
    columns: dict[str, np.ndarray] = {
        "index": np.array([record.index for record in records], np.int64)
    }
    if records[0].label is not None:
        columns["label"] = np.array([record.label for record in records], np.int32)
    if records[0].captions is not None:
        captions: list[Any] = [record.captions for record in records]
        pairs = zip(captions, picks, strict=True)
        columns["caption"] = np.array([texts[int(pick * len(texts))] for texts, pick in pairs])
    return columns


def prefetched(
    steps: grain.MapDataset, num_threads: int, num_workers: int, prefetch: int
) -> Callable[[int], Iterator[Any]]:
    """The function iterate(start_step) of a data set of batches, made ready ahead of their use."""
    if num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only app.run() parses
    options = grain.ReadOptions(
        num_threads=num_threads,
        prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0,
    )

    def iterate(start_step: int = 0) -> Iterator[Any]:
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
