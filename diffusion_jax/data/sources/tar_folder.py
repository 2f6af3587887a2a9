"""Images in webdataset's tar shards: files of one name are one sample, nothing is unpacked."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from diffusion_jax.data.sources.folder_scan import SHARDS, SUFFIXES, TEXTS
from diffusion_jax.data.sources.folder_texts import captions_in, numbers_in
from diffusion_jax.data.sources.shard_folder import Format, Sample, ShardFolder, shard_builder

_LABELS = (".cls", ".label")
_MOST_BYTES = 2**30  # of one file in a shard
_MOST_TEXT = 2**20


def builder(
    data_dir: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str],
    max_corrupt: int = 10,
) -> ShardFolder:
    """Make the builder for a folder of tar shards, as webdataset and img2dataset write them.

    A sample is what stands together and has one name up to the first dot: an image (a.jpg), and if
    known its caption (a.txt, a line each), its class (a.cls), and a.json with "caption" or "text",
    "label", and the numbers "repeats" and "weight". Which split a shard is of, see
    shard_folder.scan_shards.

    Args:
        data_dir: where TFDS data sets are prepared.
        folder: the user's folder.
        max_corrupt: samples without a readable image, or without the class or caption that others
            have, to leave out with a warning before it is an error.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no shards, or one that is cut off or no tar file.
    """
    return shard_builder(FORMAT, Path(data_dir), Path(folder), max_corrupt)


def read_tar(path: Path, images: bool) -> Iterator[Sample]:
    """Read the samples of a shard in order; without images, their bytes are left out.

    Raises ValueError for a shard that is cut off or no tar file.
    """
    key: str | None = None
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as shard:
            for member in shard:
                name, ending = _split(member.name)
                if not member.isfile() or not ending or os.path.basename(name)[:1] in (".", ""):
                    continue
                if key is not None and name != key:
                    yield from _sample(key, found)
                    found = {}
                key = name
                if ending in SUFFIXES and not images:
                    found[ending] = b""
                elif ending in (*SUFFIXES, *TEXTS, *_LABELS, ".json"):
                    most = _MOST_BYTES if ending in SUFFIXES else _MOST_TEXT
                    file = shard.extractfile(member) if member.size <= most else None
                    found[ending] = b"" if file is None else file.read()
                elif ending.endswith(SUFFIXES):  # photo.1.png: told if its sample has no image
                    found[ending] = b""
            if key is not None:
                yield from _sample(key, found)
    except (tarfile.TarError, EOFError, OSError) as error:
        # tarfile lists on more lines what else it took the file for.
        why = str(error).partition("\n")[0].rstrip(":")
        raise ValueError(f"{path} is cut off or no tar file: {why}") from error


def _split(name: str) -> tuple[str, str]:
    """Split a name at the first dot of its last part, as webdataset does -> (name, ending)."""
    folder, base = os.path.split(name)
    stem, dot, rest = base.partition(".")
    return os.path.join(folder, stem), f".{rest.lower()}" if dot else ""


def _sample(key: str, found: dict[str, bytes]) -> Iterator[Sample]:
    if not found:
        return
    image = next((found[ending] for ending in SUFFIXES if ending in found), None)
    if image is None:
        dots = any(ending.endswith(SUFFIXES) for ending in found)
        why = " (a name ends at its first dot)" if dots else ""
        yield Sample(key, problem=f"no image, only {', '.join(found)}{why}")
        return
    try:
        label, captions, numbers = _texts(found)
    except (ValueError, RecursionError) as error:
        yield Sample(key, problem=str(error))
        return
    yield Sample(key, image, label, captions, numbers=numbers)


def _texts(
    found: dict[str, bytes],
) -> tuple[str | None, tuple[str, ...] | None, tuple[tuple[str, float], ...]]:
    label, captions, numbers = None, None, ()
    if ".json" in found:
        try:
            fields = json.loads(found[".json"])
        except ValueError as error:
            raise ValueError(f"its .json is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"its .json is {type(fields).__name__} and should be an object")
        label = fields["label"] if "label" in fields else None
        if isinstance(label, (dict, list, bool)):
            raise ValueError(f"label = {label!r:.80} should be a text or a number")
        words = [fields[name] for name in ("caption", "text") if name in fields]
        captions = captions_in(words[0], "its .json") if words else None
        numbers = numbers_in(fields, "its .json")
    for ending in (e for e in TEXTS if e in found):
        lines = [line.strip() for line in _text(found, ending).splitlines()]
        captions = tuple(line for line in lines if line) or ("",)
        break
    for ending in (e for e in _LABELS if e in found):
        label = _text(found, ending).strip()
    return None if label is None else str(label).strip(), captions, numbers


def _text(found: dict[str, bytes], ending: str) -> str:
    try:
        return found[ending].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its {ending} is not UTF-8 text ({error})") from error


FORMAT = Format("tar", SHARDS["tar_folder"], read_tar)
