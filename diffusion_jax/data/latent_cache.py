"""Training batches out of a latent cache, whose files data.latent_shards describes."""

import functools
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

import grain
import numpy as np

from diffusion_jax.data.batches import (
    CENTER,
    NUM_THREADS,
    PREFETCH,
    Batches,
    Finish,
    HostBatch,
    Rows,
    check_sizes,
    columns_of,
    draw_rows,
    local_rows,
    picked,
    prefetched,
    steps_of,
)
from diffusion_jax.data.clips import Clip
from diffusion_jax.data.emphasis import ALIKE, Emphasis, with_weights
from diffusion_jax.data.latent_shards import (
    AGAIN,
    NULL_FILE,
    Entry,
    Shards,
    missing_shards,
    read_index,
    read_null,
    unpack,
)
from diffusion_jax.data.order import training_order
from diffusion_jax.data.records import Record
from diffusion_jax.data.tags import TagRule, with_tags
from diffusion_jax.data.transforms import to_float

_READ_ERRORS = (RuntimeError, ValueError, IndexError, KeyError, struct.error)


class LatentCache(NamedTuple):
    """A complete cache, open for reading.

    shapes: (h, w) of the images of each bucket; members: its record numbers, int64 [n]. null: name
    in a batch -> what stands for a dropped text [...], in the dtype that its encoder gives.
    """

    shards: Shards
    source: grain.sources.ArrayRecordDataSource
    shapes: tuple[tuple[int, int], ...]
    members: tuple[np.ndarray, ...]
    null: Mapping[str, np.ndarray]


def open_cache(shards: Shards) -> LatentCache:
    """Open a complete cache for reading.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    missing = missing_shards(shards)
    if missing or not (shards.folder / NULL_FILE).exists():
        raise ValueError(
            f"the latent cache in {shards.folder} is not complete: {len(missing)} of its "
            f"{shards.num_shards} shards are missing; the command cache makes them"
        )
    indices = [read_index(shards, shard) for shard in range(shards.num_shards)]
    shapes = tuple((height, width) for height, width in indices[0]["shapes"])
    buckets = np.concatenate([index["buckets"] for index in indices])
    return LatentCache(
        shards,
        grain.sources.ArrayRecordDataSource(
            [str(shards.path(shard)) for shard in range(shards.num_shards)]
        ),
        shapes,
        tuple(np.flatnonzero(buckets == bucket) for bucket in range(len(shapes))),
        read_null(shards),
    )


def read_entry(cache: LatentCache, number: int) -> Entry:
    """Read what stands for a record.

    Raises:
        ValueError: its shard is damaged.
    """
    try:
        header, arrays = unpack(cache.source[number])
        if header["place"] != number:
            raise ValueError(f"it is record {header['place']}")
    except _READ_ERRORS as error:
        path = cache.shards.path(number // cache.shards.shard_size)
        raise ValueError(
            f"record {number} of the latent cache cannot be read, {path} is damaged: {AGAIN} "
            f"({type(error).__name__}: {str(error):.80})"
        ) from error
    index, original, resized, label, captions = header["record"]
    captions = None if captions is None else tuple(captions)
    clip = Clip(*header["clip"]) if "clip" in header else None
    lists = header["numbers"] if "numbers" in header else {}
    numbers = {name: np.array(rows, np.float32) for name, rows in lists.items()}
    sizes = (tuple(original), tuple(resized))
    record = Record(None, *sizes, label, captions, index, clip, numbers=numbers)
    pixels = {name: arrays.pop(name) for name in header["pixels"]} if "pixels" in header else {}
    return Entry(record, header["bucket"], arrays.pop("moments"), arrays, pixels)


def cached_batches(
    cache: LatentCache,
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
    emphasis: Emphasis = ALIKE,
    tags: TagRule | None = None,
) -> Batches:
    """Make the batches of batches.make_batches with latents instead of pixels.

    The same records come in the same order, of a video always the same clip. "moments", float32
    [b, h, w, 2c], or of clips [b, t, h, w, 2c], stands for "image"; with random_flip "mirrored",
    bool [b], tells which rows are of mirrored images; the outputs of text encoders, [b, ...] as
    they are stored, belong to the row's caption; kept pixels [b, h, w, c] are float32 in [-1, 1].
    All other columns and all arguments are as in make_batches, with the options of tags as a rule.
    emphasis: how much each record of the source counts.

    Raises:
        ValueError: as make_batches; while iterating: a damaged shard.
    """
    count = cache.shards.num_records
    local = local_rows(count, batch_size, process_index, process_count)
    check_sizes(emphasis.count(count), batch_size, seed)
    members = emphasis.repeated(cache.members)
    order = training_order(members, batch_size=batch_size, seed=seed, shuffle=shuffle)
    draw = functools.partial(draw_rows, order, cache.shapes, local, batch_size, seed, random_flip)
    make = functools.partial(_cached_batch, cache, draw, random_flip)
    make = functools.partial(with_weights, make, emphasis.weights)
    make = functools.partial(with_tags, make, tags, local, seed)
    steps = steps_of(order, repeat=repeat).map(make)
    iterate = prefetched(steps, num_threads, num_workers, prefetch, finish)
    return Batches(iterate, count, order.steps_per_epoch, cache.shapes)


def _cached_batch(
    cache: LatentCache, draw: Callable[[int], Rows], random_flip: bool, step: int
) -> HostBatch:
    rows = draw(step)._replace(places=CENTER)
    entries = [read_entry(cache, int(number)) for number in rows.ids]
    columns, _ = columns_of([entry.record for entry in entries], rows)
    views = list(zip(entries, rows.mirror.astype(int), strict=True))
    moments = np.stack([entry.moments[view] for entry, view in views])
    pixels = {
        name: to_float(np.stack([entry.pixels[name][view] for entry, view in views]))
        for name in entries[0].pixels
    }
    return {
        "moments": moments.astype(np.float32),
        **({"mirrored": rows.mirror} if random_flip else {}),
        **columns,
        **pixels,
        **{
            name: np.stack(picked([entry.outputs[name] for entry in entries], rows.picks))
            for name in entries[0].outputs
        },
    }
