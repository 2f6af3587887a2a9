"""Images in Parquet files, as the datasets of Hugging Face store them; needs pyarrow."""

import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.data.sources.folder_scan import SHARDS
from diffusion_jax.data.sources.folder_texts import NUMBERS, captions_in, numbers_in
from diffusion_jax.data.sources.packages import require_packages
from diffusion_jax.data.sources.shard_folder import Format, Sample, ShardFolder, shard_builder

_USUAL = {
    "image": ("image", "img", "jpg", "png", "webp", "image_bytes"),
    "label": ("label", "labels", "class", "cls", "fine_label"),
    "caption": ("caption", "captions", "text", "prompt", "txt"),
    **{name: (name,) for name in NUMBERS},
}
_ROWS = 64  # read at a time


def builder(
    data_dir: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str],
    image: str | None = None,
    label: str | None = None,
    caption: str | None = None,
    max_corrupt: int = 10,
) -> ShardFolder:
    """Make the builder for a folder of Parquet files.

    Args:
        data_dir: where TFDS data sets are prepared.
        folder: the user's folder.
        image: name of the column of encoded images, bytes or a struct with "bytes". None, here and
            for the next two, is the first usual name that there is: image, img, jpg, ...
        label: name of the column of classes, numbers or texts: label, class, ... or none.
        caption: name of the column of captions, a text or a list: caption, text, ... or none.
            Columns "repeats" and "weight" count for data.batches.repeats_key and weight_key.
        max_corrupt: rows without a readable image, or without the class or caption that others
            have, to leave out with a warning before it is an error.

    Raises:
        FileNotFoundError: no such folder.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: no Parquet files, a damaged one, or one without such columns.
    """
    kind = make_format(image, label, caption)
    return shard_builder(kind, Path(data_dir), Path(folder), max_corrupt)


@functools.cache
def make_format(
    image: str | None = None, label: str | None = None, caption: str | None = None
) -> Format:
    """Make the format of Parquet files with columns of these names, see builder."""
    require_packages("parquet_folder", {"pyarrow": "pyarrow"})
    columns = functools.partial(
        _columns, given={"image": image, "label": label, "caption": caption}
    )
    return Format(
        "parquet",
        SHARDS["parquet_folder"],
        functools.partial(_read, columns),
        functools.partial(_names, columns),
    )


def _open(path: Path) -> Any:
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is cut off or no Parquet file: {error}") from error


def _columns(path: Path, names: list[str], given: Mapping[str, str | None]) -> dict[str, str]:
    """Choose the columns of a file: kind -> name."""
    found: dict[str, str] = {}
    for kind, usual in _USUAL.items():
        wanted = given[kind] if kind in given else None
        if wanted is not None and wanted not in names:
            raise ValueError(f"{kind} = {wanted!r} is no column of {path}; {', '.join(names)} are")
        chosen = [wanted] if wanted is not None else [name for name in usual if name in names]
        if chosen:
            found[kind] = chosen[0]
    if "image" not in found:
        raise ValueError(f"{path} has no usual column of images; set image to one of {names}")
    return found


def _read(columns: Callable[..., dict[str, str]], path: Path, images: bool) -> Iterator[Sample]:
    """Read the rows of a file in order; without images, their column is left out."""
    pyarrow, file, number = importlib.import_module("pyarrow"), _open(path), 0
    found = columns(path, file.schema_arrow.names)
    names = _names(columns, path)
    wanted = [name for kind, name in found.items() if images or kind != "image"]
    try:
        batches = file.iter_batches(_ROWS if images else 100 * _ROWS, columns=wanted)
        # Without columns, batches have no rows.
        rows = (row for batch in batches for row in batch.to_pylist())
        for row in rows if wanted else ({} for _ in range(file.metadata.num_rows)):
            yield _sample(f"{number}", row, found, names, images)
            number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is cut off or damaged at row {number}: {error}") from error


def _sample(
    name: str,
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    names: tuple[str, ...] | None,
    images: bool,
) -> Sample:
    values = {kind: row[column] for kind, column in columns.items() if column in row}
    image, label = values.get("image"), values.get("label")
    if isinstance(image, Mapping):
        image = image["bytes"] if "bytes" in image else None
    if images and not isinstance(image, bytes):
        return Sample(name, problem=f"row {name} has no encoded image, but {image!r:.80}")
    if isinstance(label, int) and names is not None and 0 <= label < len(names):
        label = names[label]
    elif not isinstance(label, str | int | None) or isinstance(label, bool):
        return Sample(name, problem=f"row {name}: label = {label!r:.80} should be a text or number")
    try:
        captions = captions_in(values["caption"], "the row") if "caption" in values else None
        numbers = numbers_in(values, "the row")
    except ValueError as error:
        return Sample(name, problem=f"row {name}: {error}")
    label = None if label is None else str(label).strip()
    encoded = image if isinstance(image, bytes) else b""
    return Sample(name, encoded, label, captions, numbers=numbers)


def _names(columns: Callable[..., dict[str, str]], path: Path) -> tuple[str, ...] | None:
    """Read the list of class names that Hugging Face's datasets keep in the schema."""
    schema = _open(path).schema_arrow
    found, words = columns(path, schema.names), (schema.metadata or {})
    if "label" not in found or b"huggingface" not in words:
        return None
    try:
        names = json.loads(words[b"huggingface"])["info"]["features"][found["label"]]["names"]
        return tuple(map(str, names))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # the column is no class label, or the words are of another kind
