"""A data set encoded once: posterior moments and outputs of text encoders in ArrayRecord shards.

A folder holds key.json, which says what it was made from; null.bin, what stands for dropped texts;
and shard i of n as i-of-n.arrayrecord with i-of-n.json, its size and checksum. A shard counts as
made when both files are there. They are written under other names first, and equal inputs give
equal bytes, so that a run that was killed goes on with the shards that are missing.
"""

import functools
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from diffusion_jax.data.batches import (
    MIDDLE,
    NUM_THREADS,
    PREFETCH,
    Batches,
    Finish,
    HostBatch,
    Rows,
    columns_of,
    draw_rows,
    picked,
    prefetched,
    steps_of,
    training_rows,
)
from diffusion_jax.data.order import training_order
from diffusion_jax.data.records import Record

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
KEY_FILE, NULL_FILE = "key.json", "null.bin"
AGAIN = "delete it, and the next start makes it again"
# Moments hardly shrink (7 %), and reading them unpacked is five times as fast.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_LENGTHS = struct.Struct("<II")
_READ_ERRORS = (RuntimeError, ValueError, IndexError, struct.error)


class Shards(NamedTuple):
    """Where a cache lies and how its records are divided.

    digest: of its key, see claim_folder.
    """

    folder: Path
    digest: str
    num_records: int
    shard_size: int

    @property
    def num_shards(self) -> int:
        """How many shards make a complete cache."""
        return -(-self.num_records // self.shard_size)

    def path(self, shard: int) -> Path:
        """Name the file of a shard; beside it with the suffix .json lies its index."""
        return self.folder / f"{shard:05d}-of-{self.num_shards:05d}.arrayrecord"

    def records(self, shard: int) -> range:
        """Numbers of the records of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_records))


class Entry(NamedTuple):
    """What training uses in the place of one record.

    record: without its image; for an unreadable image its successor, as online. bucket: of the
    place. moments: [f, h, w, 2c], the second of f = 2 of the mirrored image. outputs: name in a
    batch -> [captions, ...].
    """

    record: Record
    bucket: int
    moments: np.ndarray
    outputs: Mapping[str, np.ndarray]


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


def claim_folder(folder: Path, parts: Mapping[str, Any]) -> str:
    """Write what a cache is made from into its folder, or compare it with what is there.

    parts: name that a user knows -> value, all that JSON can hold. Returns their sha256.

    Raises:
        ValueError: the folder has a cache that was made from something else, with the difference;
            or other files.
    """
    parts = json.loads(json.dumps(dict(parts)))
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = folder / KEY_FILE
    if not path.exists():
        strangers = [child.name for child in folder.glob("[!.]*")] if folder.exists() else []
        if strangers and KEY_FILE not in strangers:  # another process may just have written it
            raise ValueError(
                f"{folder} holds no latent cache (no {KEY_FILE}), but {sorted(strangers)[0]}; "
                "choose a new folder for config.latent_cache.folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps({"sha256": digest, "parts": parts}, indent=1).encode())
        return digest
    _compare(folder, _read_json(path)["parts"], parts)
    return digest


def _compare(folder: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    def show(parts: Mapping[str, Any], name: str) -> str:
        return f"{name} = {parts[name]!r}" if name in parts else f"no {name}"

    # Sections and weights that one of them lacks altogether come after what differs in both.
    names = [name for name in wanted if name in made and made[name] != wanted[name]]
    names += [name for name in {**wanted, **made} if (name in made) != (name in wanted)]
    if names:
        shown = ", ".join(
            f"{show(made, name)} (this config has "
            f"{repr(wanted[name]) if name in wanted else 'none'})"
            for name in names[:3]
        )
        more = f" and {len(names) - 3} more that differ" if len(names) > 3 else ""
        raise ValueError(
            f"the latent cache in {folder} was made with {shown}{more}: choose another "
            "config.latent_cache.folder or delete it"
        )


def missing_shards(shards: Shards) -> list[int]:
    """Numbers of the shards that are still to be made.

    Raises:
        ValueError: a shard that was made is cut short, or belongs to another cache.
    """
    missing = []
    for shard in range(shards.num_shards):
        path = shards.path(shard)
        if path.exists() and path.with_suffix(".json").exists():
            _check_shard(shards, shard)
        else:
            missing.append(shard)
    return missing


def _check_shard(shards: Shards, shard: int) -> dict[str, Any]:
    path = shards.path(shard)
    index = _read_json(path.with_suffix(".json"))
    size, count = path.stat().st_size, len(shards.records(shard))
    if index["key"] != shards.digest:
        raise ValueError(f"the shard {path} belongs to another latent cache: {AGAIN}")
    if size != index["bytes"] or count != index["records"]:
        raise ValueError(
            f"the shard {path} of the latent cache is damaged: it has {size} bytes for {count} "
            f"records, its index says {index['bytes']} for {index['records']}: {AGAIN}"
        )
    return index


def verify_shards(shards: Shards) -> None:
    """Read every shard of a complete cache and compare its checksum.

    Raises:
        ValueError: the first shard that is missing or damaged.
    """
    for shard in range(shards.num_shards):
        path = shards.path(shard)
        if not path.exists():
            raise ValueError(f"the shard {path} of the latent cache is missing")
        if _sha256(path) != _check_shard(shards, shard)["sha256"]:
            raise ValueError(
                f"the shard {path} of the latent cache is damaged: its bytes are not those that "
                f"were written: {AGAIN}"
            )


def write_shard(
    shards: Shards,
    shard: int,
    entries: Iterable[Entry],
    shapes: Sequence[tuple[int, int]],
    dtype: str,
) -> None:
    """Write the entries of a shard, one for each of its records in their order.

    dtype: of DTYPES, to store moments and outputs in. What an earlier process left unfinished is
    written over.

    Raises:
        ValueError: another number of entries, or a value that the dtype cannot hold.
    """
    path, buckets = shards.path(shard), []
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    writer = ArrayRecordWriter(str(unfinished), _WRITER_OPTIONS)
    try:
        for number, entry in zip(shards.records(shard), entries, strict=True):
            writer.write(_pack_entry(entry, number, dtype))
            buckets.append(entry.bucket)
    finally:
        writer.close()
    index = {
        "key": shards.digest,
        "records": len(buckets),
        "bytes": unfinished.stat().st_size,
        "sha256": _sha256(unfinished),
        "shapes": [list(shape) for shape in shapes],
        "buckets": buckets,
    }
    path.with_suffix(".json").unlink(missing_ok=True)
    unfinished.replace(path)
    _write(path.with_suffix(".json"), json.dumps(index).encode())


def write_null(folder: Path, null: Mapping[str, np.ndarray]) -> None:
    """Write what stands for a dropped text: name in a batch -> [...]."""
    _write(folder / NULL_FILE, _pack({}, null))


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
    indices = [_check_shard(shards, shard) for shard in range(shards.num_shards)]
    shapes = tuple((height, width) for height, width in indices[0]["shapes"])
    buckets = np.concatenate([index["buckets"] for index in indices])
    return LatentCache(
        shards,
        grain.sources.ArrayRecordDataSource(
            [str(shards.path(shard)) for shard in range(shards.num_shards)]
        ),
        shapes,
        tuple(np.flatnonzero(buckets == bucket) for bucket in range(len(shapes))),
        _unpack((shards.folder / NULL_FILE).read_bytes())[1],
    )


def read_entry(cache: LatentCache, number: int) -> Entry:
    """Read what stands for a record.

    Raises:
        ValueError: its shard is damaged.
    """
    try:
        header, arrays = _unpack(cache.source[number])
    except _READ_ERRORS as error:
        path = cache.shards.path(number // cache.shards.shard_size)
        raise ValueError(
            f"record {number} of the latent cache cannot be read, {path} is damaged: {AGAIN} "
            f"({type(error).__name__}: {str(error):.80})"
        ) from error
    index, original, resized, label, captions = header["record"]
    captions = None if captions is None else tuple(captions)
    record = Record(None, tuple(original), tuple(resized), label, captions, index)
    return Entry(record, header["bucket"], arrays.pop("moments"), arrays)


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
) -> Batches:
    """Make the batches of batches.make_batches with latents instead of pixels.

    The same records come in the same order. "moments", float32 [b, h, w, 2c], stands for "image";
    with random_flip "mirrored", bool [b], tells which rows are of mirrored images; the outputs of
    text encoders, [b, ...] as they are stored, belong to the row's caption. All other columns and
    all arguments are as in make_batches.

    Raises:
        ValueError: as make_batches; while iterating: a damaged shard.
    """
    count = cache.shards.num_records
    local = training_rows(count, batch_size, seed, process_index, process_count)
    order = training_order(cache.members, batch_size=batch_size, seed=seed, shuffle=shuffle)
    draw = functools.partial(draw_rows, order, cache.shapes, local, batch_size, seed, random_flip)
    make = functools.partial(_cached_batch, cache, draw, random_flip)
    steps = steps_of(order, repeat=repeat).map(make)
    iterate = prefetched(steps, num_threads, num_workers, prefetch, finish)
    return Batches(iterate, count, order.steps_per_epoch, cache.shapes)


def _cached_batch(
    cache: LatentCache, draw: Callable[[int], Rows], random_flip: bool, step: int
) -> HostBatch:
    rows = draw(step)._replace(places=MIDDLE)
    entries = [read_entry(cache, int(number)) for number in rows.ids]
    columns, _ = columns_of([entry.record for entry in entries], rows)
    views = zip(entries, rows.mirror.astype(int), strict=True)
    moments = np.stack([entry.moments[view] for entry, view in views])
    return {
        "moments": moments.astype(np.float32),
        **({"mirrored": rows.mirror} if random_flip else {}),
        **columns,
        **{
            name: np.stack(picked([entry.outputs[name] for entry in entries], rows.picks))
            for name in entries[0].outputs
        },
    }


def _pack_entry(entry: Entry, number: int, dtype: str) -> bytes:
    arrays = {}
    for name, values in {"moments": entry.moments, **entry.outputs}.items():
        with np.errstate(over="ignore"):
            arrays[name] = values.astype(DTYPES[dtype])
        if not np.isfinite(arrays[name]).all():
            cause = "is not finite"
            if np.isfinite(values).all():
                cause = f"reaches {np.abs(values).max():.4g}, which {dtype} cannot hold"
            raise ValueError(
                f"{name} of record {number} {cause}; choose another config.latent_cache.dtype, or "
                "float32 for the network that made it"
            )
    record = entry.record
    stored = (record.index, record.original_size, record.resized_size, record.label)
    return _pack({"record": (*stored, record.captions), "bucket": entry.bucket}, arrays)


def _pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Write a checksum, the length of the header, the header as JSON and the arrays."""
    described = [(name, str(array.dtype), array.shape) for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": described}).encode()
    body = b"".join([text, *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])
    return _LENGTHS.pack(zlib.crc32(body), len(text)) + body


def _unpack(packed: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    checksum, length = _LENGTHS.unpack_from(packed)
    body = memoryview(packed)[_LENGTHS.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError("its checksum differs")
    header, arrays, start = json.loads(bytes(body[:length])), {}, length
    for name, dtype, shape in header.pop("arrays"):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, DTYPES[dtype], count, start).reshape(shape)
        start += arrays[name].nbytes
    return header, arrays


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} of the latent cache is damaged ({error}): {AGAIN}") from error


def _write(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it is there; other processes may write the same."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
