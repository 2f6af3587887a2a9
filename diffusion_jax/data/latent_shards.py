"""The files of a latent cache: shards of encoded records, each with an index and checksums.

A folder holds key.json, which says what the cache was made from; null.bin, what stands for dropped
texts; and shard i of n as i-of-n.arrayrecord with i-of-n.json, its position, buckets and checksum.
Every file has a checksum and names its cache and its place in it. A shard counts as made
when both its files are there. Files are written under other names first and get theirs when they
are on the disk, and equal inputs give equal bytes, so that a run that was killed goes on with the
shards that are missing.
"""

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from diffusion_jax.data.progress import log_progress
from diffusion_jax.data.records import Record

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
_STORED = {**DTYPES, "uint8": np.uint8}
KEY_FILE, NULL_FILE = "key.json", "null.bin"
_NEXT = "the next start makes it again"
AGAIN = f"delete it, and {_NEXT}"
_ANOTHER = "choose another config.latent_cache.folder or delete it"
# Moments hardly shrink (7 %), and reading them unpacked is five times as fast.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_LENGTHS = struct.Struct("<II")
_READERS = 8


class Shards(NamedTuple):
    """Where a cache lies and how its records are divided into shards.

    digest: the SHA-256 that claim_folder returns.
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

    record: without its image; if that is unreadable, the record that takes its place online.
    bucket: the bucket that it was sorted into. moments: [f, h, w, 2c], or [f, t, h, w, 2c] of a
    clip, where f = 2 adds the mirrored image. outputs: name in a batch -> [captions, ...]. pixels:
    name in a batch -> uint8 [f, h, w, c], kept as they are.
    """

    record: Record
    bucket: int
    moments: np.ndarray
    outputs: Mapping[str, np.ndarray]
    pixels: Mapping[str, np.ndarray] = {}


def claim_folder(folder: Path, parts: Mapping[str, Any]) -> str:
    """Write a description of a cache into its folder, or compare it with the one that is there.

    parts: name that a user knows -> value, all that JSON can hold. Returns their SHA-256.

    Raises:
        ValueError: the folder has a cache that was made from something else, with the difference;
            or other files.
    """
    parts = json.loads(json.dumps(dict(parts)))
    digest = _digest(parts)
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
    made = _read_json(path, _ANOTHER)
    if "parts" not in made or _digest(made["parts"]) != made.get("sha256"):
        raise ValueError(f"{path} of the latent cache is damaged, its checksum differs: {_ANOTHER}")
    _compare(folder, made["parts"], parts)
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
        raise ValueError(f"the latent cache in {folder} was made with {shown}{more}: {_ANOTHER}")


def missing_shards(shards: Shards) -> list[int]:
    """List the shards that are still to be made.

    Raises:
        ValueError: a shard that was made is cut short, or its index is damaged or belongs to
            another cache or place.
    """
    missing = []
    for shard in range(shards.num_shards):
        path = shards.path(shard)
        if path.exists() and path.with_suffix(".json").exists():
            read_index(shards, shard)
        else:
            missing.append(shard)
    return missing


def read_index(shards: Shards, shard: int) -> dict[str, Any]:
    """Read what the index of a shard says, checked: see write_shard.

    Raises:
        ValueError: as missing_shards.
    """
    path = shards.path(shard)
    file = path.with_suffix(".json")
    for part in (path, file):
        if not part.is_file():
            raise ValueError(f"{part} of the latent cache is missing: {_NEXT}")
    index = _read_json(file)
    check = index.pop("check", None)
    if check != _digest(index):
        raise ValueError(f"{file} of the latent cache is damaged, its checksum differs: {AGAIN}")
    if (index["key"], index["shard"]) != (shards.digest, shard):
        raise ValueError(f"the shard {path} belongs to another latent cache or place: {AGAIN}")
    size = path.stat().st_size
    if size != index["bytes"]:
        raise ValueError(
            f"the shard {path} of the latent cache is damaged: it has {size} bytes, and had "
            f"{index['bytes']} when it was made: {AGAIN}"
        )
    return index


def verify_shards(shards: Shards, numbers: Iterable[int] | None = None) -> None:
    """Read every byte of shards (None: of all) and compare it with the checksums.

    Raises:
        ValueError: the first shard that is missing or damaged.
    """
    numbers = list(range(shards.num_shards) if numbers is None else numbers)

    def verify(shard: int) -> None:
        path, index = shards.path(shard), read_index(shards, shard)
        if _sha256(path) != index["sha256"]:
            raise ValueError(
                f"the shard {path} of the latent cache is damaged: its bytes are not those that "
                f"were written: {AGAIN}"
            )

    with ThreadPoolExecutor(_READERS) as pool:
        results: Iterator[None] = pool.map(verify, numbers)
        for _ in log_progress(results, len(numbers), "comparing checksums of shards"):
            pass


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
        OSError: the disk is full.
    """
    path, buckets = shards.path(shard), []
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with contextlib.closing(ArrayRecordWriter(str(unfinished), _WRITER_OPTIONS)) as writer:
            for number, entry in zip(shards.records(shard), entries, strict=True):
                writer.write(_pack_entry(entry, number, dtype))
                buckets.append(entry.bucket)
    except RuntimeError as error:  # what ArrayRecord says of a full disk
        unfinished.unlink(missing_ok=True)
        reason = str(error).partition(";")[0]
        raise OSError(f"cannot write the shard {path} of the latent cache: {reason}") from error
    index = {
        "key": shards.digest,
        "shard": shard,
        "bytes": unfinished.stat().st_size,
        "sha256": _sha256(unfinished),
        "shapes": [list(shape) for shape in shapes],
        "buckets": buckets,
    }
    path.with_suffix(".json").unlink(missing_ok=True)
    _put(unfinished, path)
    _write(path.with_suffix(".json"), json.dumps(index | {"check": _digest(index)}).encode())


def write_null(shards: Shards, null: Mapping[str, np.ndarray]) -> None:
    """Write what stands for a dropped text: name in a batch -> [...]."""
    _write(shards.folder / NULL_FILE, _pack({"key": shards.digest}, null))


def read_null(shards: Shards) -> dict[str, np.ndarray]:
    """Read what stands for a dropped text.

    Raises:
        ValueError: the file is damaged or belongs to another cache.
    """
    path = shards.folder / NULL_FILE
    try:
        header, null = unpack(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path} of the latent cache is missing: {_NEXT}") from error
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path} of the latent cache is damaged ({error}): {AGAIN}") from error
    if header["key"] != shards.digest:
        raise ValueError(f"{path} belongs to another latent cache: {AGAIN}")
    return null


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
    header = {"record": (*stored, record.captions), "bucket": entry.bucket, "place": number}
    if record.clip is not None:
        header["clip"] = record.clip
    if record.numbers:
        header["numbers"] = {name: rows.tolist() for name, rows in record.numbers.items()}
    if entry.pixels:
        header["pixels"] = list(entry.pixels)
    return _pack(header, {**arrays, **entry.pixels})


def _pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Write a checksum, the length of the header, the header as JSON and the arrays."""
    described = [(name, str(array.dtype), array.shape) for name, array in arrays.items()]
    text = json.dumps({**header, "arrays": described}).encode()
    body = b"".join([text, *(np.ascontiguousarray(array).tobytes() for array in arrays.values())])
    return _LENGTHS.pack(zlib.crc32(body), len(text)) + body


def unpack(packed: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and the arrays of a record or of null.bin; ValueError when they changed."""
    checksum, length = _LENGTHS.unpack_from(packed)
    body = memoryview(packed)[_LENGTHS.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError("its checksum differs")
    header, arrays, start = json.loads(bytes(body[:length])), {}, length
    for name, dtype, shape in header.pop("arrays"):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, _STORED[dtype], count, start).reshape(shape)
        start += arrays[name].nbytes
    return header, arrays


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} of the latent cache is damaged ({error}): {advice}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} of the latent cache is damaged, it holds no object: {advice}")
    return found


def _write(path: Path, content: bytes) -> None:
    """Write a file that is complete whenever it is there; other processes may write the same."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    _put(unfinished, path)


def _put(unfinished: Path, path: Path) -> None:
    """Give a file its name once its bytes are on the disk, and wait until the name is there too."""
    _sync(unfinished)
    unfinished.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
