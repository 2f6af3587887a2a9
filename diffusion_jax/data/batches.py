"""Batches as a pure function of (seed, step): shuffled for training, in order for evaluation."""

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from diffusion_jax.data import transforms
from diffusion_jax.data.clips import clip_columns
from diffusion_jax.data.emphasis import with_weights
from diffusion_jax.data.images import ImageOptions, Images, open_images
from diffusion_jax.data.masks import with_masks
from diffusion_jax.data.order import (
    AUGMENT,
    CAPTION,
    CLIP,
    Order,
    evaluation_order,
    training_order,
    uniform,
)
from diffusion_jax.data.records import MIDDLE, Record, Records
from diffusion_jax.data.tags import with_tags
from diffusion_jax.data.views import with_views

NUM_THREADS, PREFETCH = 2, 4
CENTER = np.array([[MIDDLE, MIDDLE]])

HostBatch = dict[str, np.ndarray]
# What is done to each batch of arrays before the consumer gets it.
Finish = Callable[[HostBatch], dict[str, Any]]


class Batches(NamedTuple):
    """Batches that can be read from any step on, and how many there are.

    iterate: start_step -> this process's rows of global batch start_step, start_step + 1, ..., each
    batch a dict of numpy arrays:
        "image": float32 [b, h, w, c] in [-1, 1]; with num_frames = t clips, [b, t, h, w, c].
        "fps_id": float32 [b, 1], of clips: their frames per second less 1, as SVD counts them; 0
            for a still.
        "motion_bucket_id": float32 [b, 1], of clips: 0 to 255, see data.motion.
        "image_only_indicator": float32 [b, t], of clips: 1 where the frames of a row are one image
            that is repeated, 0 for video.
        "original_size": int32 [b, 2], (height, width) of the stored image, upright.
        "crop_top_left": int32 [b, 2], (top, left) of the window in the resized image; for a
            mirrored image, in the mirrored one.
        "target_size": int32 [b, 2], (h, w) of the batch's images.
        "index": int64 [b], record numbers.
        "label": int32 [b] and "caption": str [b], when the data have them.
        "loss_mask": float32 [b, h, w, 1] in [0, 1], with loss_mask: how much each pixel counts.
        "mask": float32 [b, h, w, 1], with masks: 1 where the image is kept, and "masked_image",
            the image there and 0 elsewhere.
        "loss_weight": float32 [b], with weight_key: what the loss of each sample is multiplied by.
        Each of image_columns: float32 [b, h, w, 3] in [-1, 1], cut and mirrored as the image is.
        Each of number_columns that the data have: float32 [b, d], and of frame_columns [b, n, d],
            of the n frames that are shown of a record, with d = 1 for single numbers.
        "given_view": float32 [b, t, h, w, c], with num_views; "image" then has the others.
        "weight": float32 [b], from eval_batches.
    A source of clips that says no "fps" gives neither fps_id nor motion_bucket_id. num_examples:
    records of the source. steps_per_epoch: batches in one pass over them. shapes: every (h, w) that
    occurs: one, or with buckets one per bucket.

    The sizes are the micro-conditioning of SDXL (Podell et al. 2023, section 2.2).
    """

    iterate: Callable[[int], Iterator[dict[str, Any]]]
    num_examples: int
    steps_per_epoch: int
    shapes: tuple[tuple[int, int], ...]


class Rows(NamedTuple):
    """The rows of one batch that this process makes, and the random choices for them.

    ids: record numbers, int64 [b]. size: (h, w) of the images. real: bool [b], False for padding.
    mirror: bool [b]. places: float [b | 1, 2] in [0, 1), where windows are cut. picks: float [b] in
    [0, 1), which of its captions a record shows. starts: float [b] in [0, 1), which of its clips.
    """

    ids: np.ndarray
    size: tuple[int, int]
    real: np.ndarray
    mirror: np.ndarray
    places: np.ndarray
    picks: np.ndarray
    starts: np.ndarray


def make_batches(
    source: Records,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    random_flip: bool = False,
    num_threads: int = NUM_THREADS,
    num_workers: int = 0,
    prefetch: int = PREFETCH,
    process_index: int = 0,
    process_count: int = 1,
    finish: Finish | None = None,
    **image_options: Any,
) -> Batches:
    """Make batches for training: global batch k is a function of (seed, k) and of nothing else.

    The records of each bucket are an endless stream of shuffled epochs, cut into batches without
    regard to where an epoch ends, so every record is seen equally often: order.training_order. An
    unreadable record is replaced by the next readable one.

    Args:
        source: what open_source returns, or any sequence of dicts with an image. If a record has
            several captions, each batch draws one.
        batch_size: records per global batch; each of n processes gets one of n blocks of rows.
        seed: for order and augmentations, 0 <= seed < 2**64.
        shuffle: a new order every epoch; else the order of the source.
        repeat: batches never end; else they are one epoch, without the last incomplete batch of
            each bucket.
        random_flip: mirror each image left to right with probability 1/2.
        num_threads: threads that make batches ahead of their use; 0 makes them in next().
        num_workers: processes that make batches instead of threads.
        prefetch: how many batches are kept ready.
        process_index: which of the processes of a run this is.
        process_count: how many processes the run has.
        finish: applied to every batch in the prefetching threads. Worker processes would have to
            pickle it, so with num_workers a thread of this process applies it to what they send.
            Only with num_threads=0 and num_workers=0 does the caller of next() run it.
        image_options: fields of images.ImageOptions; image_size must be given.

    Raises:
        ValueError: empty source, fewer records than a batch, a batch that does not divide by the
            processes, or an option outside its choices; while iterating: too many corrupt images.
    """
    options = ImageOptions(**image_options)
    if options.cache and num_workers:
        raise ValueError(
            f"num_workers = {num_workers} should be 0 with cache = True, which keeps images in the "
            "memory of this process"
        )
    local = local_rows(len(source), batch_size, process_index, process_count)
    images = open_images(source, options, at_least=batch_size)
    check_sizes(images.emphasis.count(len(source)), batch_size, seed)
    members = images.emphasis.repeated(images.members)
    order = training_order(members, batch_size=batch_size, seed=seed, shuffle=shuffle)
    draw = functools.partial(draw_rows, order, images.shapes, local, batch_size, seed, random_flip)
    make = functools.partial(_training_batch, images, options, draw)
    make = functools.partial(with_views, make, options.num_views)
    make = functools.partial(with_weights, make, images.emphasis.weights)
    make = functools.partial(
        with_masks, make, options.masks, options.loss_mask, local, batch_size, seed
    )
    make = functools.partial(with_tags, make, options.tag_rule, local, seed)
    iterate = prefetched(
        steps_of(order, repeat=repeat).map(make), num_threads, num_workers, prefetch, finish
    )
    return Batches(iterate, len(source), order.steps_per_epoch, images.shapes)


def eval_batches(
    source: Records,
    *,
    batch_size: int,
    num_threads: int = NUM_THREADS,
    prefetch: int = PREFETCH,
    process_index: int = 0,
    process_count: int = 1,
    finish: Finish | None = None,
    **image_options: Any,
) -> Batches:
    """Make batches for evaluation: every record once, in the order of the source, the last padded.

    Arguments as in make_batches. "weight" is 1 for records and 0 for padding, whose "index" is -1;
    an unreadable image (up to max_corrupt) is black with weight 0. So the mean over the data set is
    sum(weight * value) / sum(weight). The first of several captions is shown. With buckets, one
    bucket comes after the other and the last batch of each is padded.

    Raises:
        ValueError: as make_batches, but a batch may be larger than the data set.
    """
    options = ImageOptions(**image_options)
    if options.crop == "random":
        raise ValueError("crop = 'random' should be 'center' or 'stretch' for evaluation")
    local = local_rows(len(source), batch_size, process_index, process_count)
    images = open_images(source, options)
    order = evaluation_order(images.members, batch_size=batch_size)
    make = functools.partial(_evaluation_batch, images, options, order, local)
    make = functools.partial(with_views, make, options.num_views)
    make = functools.partial(with_weights, make, images.emphasis.weights)
    make = functools.partial(
        with_masks, make, options.masks, options.loss_mask, local, batch_size, 0
    )
    steps = steps_of(order, repeat=False).map(make)
    iterate = prefetched(steps, num_threads, 0, prefetch, finish)
    return Batches(iterate, len(source), order.steps_per_epoch, images.shapes)


def draw_rows(
    order: Order,
    shapes: tuple[tuple[int, int], ...],
    local: np.ndarray,
    batch_size: int,
    seed: int,
    random_flip: bool,
    step: int,
) -> Rows:
    """Choose records, flips, windows and captions for the rows `local` of training batch `step`.

    Everything is drawn for the global batch, so it does not depend on the number of processes.
    """
    bucket, ids = order.at(step)
    augment = uniform(seed, AUGMENT, step, (batch_size, 3))[local]
    return Rows(
        ids[local],
        shapes[bucket],
        real=np.ones(len(local), bool),
        mirror=(augment[:, 0] < 0.5) & random_flip,
        places=augment[:, 1:],
        picks=uniform(seed, CAPTION, step, (batch_size,))[local],
        starts=uniform(seed, CLIP, step, (batch_size,))[local],
    )


def _training_batch(
    images: Images, options: ImageOptions, draw: Callable[[int], Rows], step: int
) -> HostBatch:
    rows = draw(step)
    if options.crop != "random":
        rows = rows._replace(places=CENTER)
    chosen = zip(rows.ids.tolist(), rows.starts.tolist(), strict=True)
    records = [images.read_or_next(number, rows.size, start) for number, start in chosen]
    columns, corners = columns_of(records, rows)

    def shown(images: list[Any]) -> np.ndarray:
        if options.crop == "random":
            images = [
                _cut(image, record, rows.size, corner, options.resize)
                for image, record, corner in zip(images, records, corners.tolist(), strict=True)
            ]
        pixels = np.stack(images)
        pixels[rows.mirror] = pixels[rows.mirror][..., ::-1, :]
        return transforms.to_float(pixels)

    others = {name: shown([r.columns[name] for r in records]) for name in options.columns}
    return {"image": shown([r.image for r in records]), **others, **columns}  # all readable here


def _cut(
    image: np.ndarray, record: Record, size: tuple[int, int], corner: list[int], resize: str
) -> np.ndarray:
    """Cut the same window out of an image [h w c], or out of every frame of a clip [t h w c]."""
    if image.ndim == 4:
        return np.stack([_cut(frame, record, size, corner, resize) for frame in image])
    return transforms.cut(image, record.resized_size, size, corner, resize)


def _evaluation_batch(
    images: Images, options: ImageOptions, order: Order, local: np.ndarray, step: int
) -> HostBatch:
    bucket, ids = order.at(step)
    real = ids[local] >= 0
    none = np.zeros(len(local))
    # Padding is another copy of a record of this batch, whose first row always is one.
    filled = np.where(real, ids[local], ids[0])
    rows = Rows(filled, images.shapes[bucket], real, none.astype(bool), CENTER, none, none + MIDDLE)
    records = [images.read(int(number), rows.size) for number in rows.ids]
    readable = np.array([record.image is not None for record in records])
    frames = () if options.clips is None else (options.clips.shown,)
    black = np.zeros((*frames, *rows.size, options.channels), np.uint8)
    pixels = np.stack([black if record.image is None else record.image for record in records])
    columns, _ = columns_of(records, rows)
    blank = np.zeros((*rows.size, 3), np.uint8)
    for name in options.columns:
        others = [r.columns[name] if name in r.columns else blank for r in records]
        columns[name] = transforms.to_float(np.stack(others))
    weight = (real & readable).astype(np.float32)
    return {"image": transforms.to_float(pixels), **columns, "weight": weight}


def check_sizes(num_examples: int, batch_size: int, seed: int) -> None:
    """Raise ValueError when an epoch does not fill a batch, or for a seed outside its range."""
    if num_examples < batch_size:
        raise ValueError(
            f"batch_size = {batch_size} should be at most {num_examples}, the records of the data "
            "set"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed} should be at least 0 and less than 2**64")


def local_rows(
    num_examples: int, batch_size: int, process_index: int, process_count: int
) -> np.ndarray:
    """Give the rows of one process: a block, as a mesh over processes lays them out.

    Raises ValueError for no records, and for a batch that does not divide by the processes.
    """
    if num_examples == 0:
        raise ValueError("the data set is empty: it has 0 records in this split")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index = {process_index} should be between 0 and {process_count - 1}"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size = {batch_size} should be a positive multiple of the {process_count} "
            "processes"
        )
    rows = batch_size // process_count
    return np.arange(process_index * rows, (process_index + 1) * rows)


def columns_of(records: list[Record], rows: Rows) -> tuple[HostBatch, np.ndarray]:
    """Make all columns of a batch but the images -> (columns, (top, left) of windows, int [b, 2]).

    "crop_top_left" of a mirrored image counts from the left of what is seen: the image is mirrored
    first and cut afterwards.
    """
    resized = np.array([record.resized_size for record in records])
    corners = transforms.corners(resized, rows.size, rows.places)
    seen = corners.astype(np.int32)
    seen[rows.mirror, 1] = (resized[:, 1] - rows.size[1] - corners[:, 1])[rows.mirror]
    index = np.array([record.index for record in records], np.int64)
    columns: HostBatch = {
        "original_size": np.array([record.original_size for record in records], np.int32),
        "crop_top_left": seen,
        "target_size": np.tile(np.array(rows.size, np.int32), (len(records), 1)),
        "index": np.where(rows.real, index, -1),
    }
    clips = [record.clip for record in records if record.clip is not None]
    if clips:
        columns |= clip_columns(clips)
    for name in records[0].numbers.keys() - columns.keys():
        columns[name] = np.stack([record.numbers[name] for record in records])
    if records[0].label is not None:
        columns["label"] = np.array([record.label for record in records], np.int32)
    if records[0].captions is not None:
        captions: list[Any] = [record.captions for record in records]
        columns["caption"] = np.array(picked(captions, rows.picks))
    return columns, corners


def picked(choices: Sequence[Any], picks: np.ndarray) -> list[Any]:
    """Pick one of the choices of each row; picks [b] in [0, 1) tell which."""
    pairs = zip(choices, picks, strict=True)
    return [several[int(pick * len(several))] for several, pick in pairs]


def steps_of(order: Order, *, repeat: bool) -> grain.MapDataset:
    """Number the batches of one epoch or, with repeat, endlessly."""
    # A range far beyond any run rather than .repeat(), which would start the step numbers again.
    return grain.MapDataset.range(2**60 if repeat else order.steps_per_epoch)


def prefetched(
    steps: grain.MapDataset,
    num_threads: int,
    num_workers: int,
    prefetch: int,
    finish: Finish | None = None,
) -> Callable[[int], Iterator[Any]]:
    """Make the function iterate(start_step) of a data set of batches, made ahead of their use."""
    if num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, which only app.run() parses
    if finish is not None and not num_workers:
        steps = steps.map(finish)
    options = grain.ReadOptions(
        num_threads=num_threads,
        prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0,
    )

    def iterate(start_step: int = 0) -> Iterator[Any]:
        if start_step < 0:
            raise ValueError(f"start_step = {start_step} should be at least 0")
        batches = steps[start_step:].to_iter_dataset(options)
        if num_workers:
            workers = grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=max(1, prefetch // num_workers)
            )
            batches = batches.mp_prefetch(workers, worker_init_fn=end_with_parent)
            if finish is not None:
                batches = grain.experimental.ThreadPrefetchIterDataset(
                    batches.map(finish), prefetch_buffer_size=max(1, prefetch)
                )
            return _from_workers(iter(batches))
        return iter(batches)

    return iterate


def end_with_parent(worker: int, num_workers: int) -> None:
    """End this process as soon as the process that started it is gone, however it went.

    A training process that gets SIGKILL cannot end its workers. They would stay, with their memory.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, (
        f"worker {worker} of {num_workers} was not started by multiprocessing"
    )

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()


def _from_workers(batches: Iterator[Any]) -> Iterator[Any]:
    """Pass on what worker processes make; OSError when one of them has died."""
    try:
        yield from batches
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise OSError(
            "a worker process of config.data.batches.num_workers has died: it was killed or ran "
            "out of memory"
        ) from error
