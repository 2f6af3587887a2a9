"""What the text files of an image folder say: metadata.jsonl or .csv, and a.txt by a.png."""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.emphasis import LARGEST
from diffusion_jax.data.sources.cameras import Cameras, cameras_in

METADATA = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.csv")


class Number(NamedTuple):
    """The smallest number that a field may hold, and its type."""

    least: int
    kind: type[np.generic]


# Fields that say how much an image counts.
NUMBERS = {"repeats": Number(1, np.int64), "weight": Number(0, np.float32)}
# How the names of fields end that name another image of a row.
_IMAGE, _FILE_NAME = "_image", "_file_name"


class Row(NamedTuple):
    """What a metadata file says about an image or video, which lies in the folder of the file.

    images: other images of the row by column, such as "conditioning_image", in one order. numbers:
    the fields of NUMBERS that it has. cameras: of each frame of a video.
    """

    path: Path
    label: str | None
    captions: tuple[str, ...] | None
    images: tuple[tuple[str, Path], ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()
    cameras: Cameras | None = None


def find_metadata(folder: Path) -> Path | None:
    """Find the metadata file of a folder, the first of METADATA that is there.

    Capital letters do not matter. Raises ValueError for a folder, a dead link or a pipe.
    """
    here = {name.lower(): folder / name for name in sorted(os.listdir(folder))}
    paths = [here[name] for name in METADATA if name in here]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} should be a file of text; rename it or take it away")
    return paths[0] if paths else None


def read_metadata(
    file: Path, *, also: Callable[[Path], bool] | None = None, of_videos: bool = False
) -> list[Row]:
    """Read a metadata file: a JSON object a line, or a table with a header.

    Fields: "file_name"; if known "caption" or "text", a text or in JSON a list of texts; "label";
    "repeats" and "weight", numbers, empty for 1; and for another image "conditioning_image" or
    "conditioning_image_file_name", or any other name that ends so. also: tells which paths may be
    named besides files. of_videos: whether there may be "elevations" and "azimuths", see
    cameras.cameras_in.

    Raises:
        ValueError: a line that is not of this form, names a file outside the folder or one that
            another line names already, or no lines at all.
        FileNotFoundError: a line names a file that is not there.
    """
    rows: list[Row] = []
    lines: dict[Path, str] = {}
    for where, fields in _json_lines(file) if file.suffix.lower() == ".jsonl" else _table(file):
        row = _row(file.parent, where, fields, also)
        row = row._replace(cameras=cameras_in(fields, where)) if of_videos else row
        if row.path in lines:
            raise ValueError(
                f"{where} names {fields['file_name']!r} again after line {lines[row.path]}; give "
                "each image one line, in metadata.jsonl with a list of captions if it has several"
            )
        lines[row.path] = where.rpartition(":")[2]
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no lines, so there are no images")
    return rows


def read_captions(file: Path) -> tuple[str, ...]:
    """Read the captions of one image, one a line; an empty file is the caption ""."""
    return tuple(line.strip() for line in _text(file).splitlines() if line.strip()) or ("",)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise OSError(f"{file} cannot be read ({error.strerror})") from error


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error})") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
            raise ValueError(
                f'{where} should be an object with "file_name" and, if known, "caption" and '
                f'"label", not {line.strip()[:80]}'
            )
        yield where, fields


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _table(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(
        io.StringIO(_text(file), newline=""), strict=True, skipinitialspace=True
    )
    try:
        header = list(reader.fieldnames or ())
        if "file_name" not in header or len(set(header)) < len(header):
            raise ValueError(
                f"{file}:1 should be a header with file_name and, if known, caption and label, "
                f"each once and with commas between them, not {','.join(header)!r:.80}"
            )
        for fields in reader:
            where = f"{file}:{reader.line_num}"
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{where} should have {len(header)} fields like the header; "
                    "put quotation marks around a text that holds commas"
                )
            label = {"label": fields["label"] or None} if "label" in fields else {}
            yield where, {**fields, **label}
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.reader.line_num} is not CSV ({error})") from error


def _row(
    folder: Path, where: str, fields: dict[str, Any], also: Callable[[Path], bool] | None
) -> Row:
    path = _file_of(folder, where, fields["file_name"], also)
    images = {
        key.removesuffix(_FILE_NAME): _file_of(folder, where, name)
        for key, name in fields.items()
        if key.removesuffix(_FILE_NAME).endswith(_IMAGE) and isinstance(name, str)
    }
    label = fields.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int | float | None):
        raise ValueError(f"{where}: a label should be a text or a number, not {label!r:.80}")
    caption = fields["caption"] if "caption" in fields else fields.get("text")
    return Row(
        path,
        None if label is None else _unicode(str(label).strip(), where),
        captions_in(caption, where),
        tuple(sorted(images.items())),
        numbers_in(fields, where),
    )


def _file_of(
    folder: Path, where: str, name: str, also: Callable[[Path], bool] | None = None
) -> Path:
    path = Path(os.path.normpath(folder / name))
    if os.path.isabs(name) or not path.is_relative_to(folder):
        raise ValueError(f"{where} names {name!r:.200}, which should lie in {folder}")
    if not os.path.isfile(path) and (also is None or not also(path)):
        raise FileNotFoundError(f"{where} names {name!r:.200}, which is no file in {folder}")
    return path


def captions_in(value: Any, where: str) -> tuple[str, ...] | None:
    """Read one caption or a list of them; a number may be a caption too, None and [] are none.

    where: for messages. Raises ValueError for anything else.
    """
    if value is None or value == []:
        return None
    texts = value if isinstance(value, list) else [value]
    wrong = [text for text in texts if not isinstance(text, str | int | float)]
    if wrong:
        raise ValueError(
            f"{where}: a caption should be a text or a list of texts, not {wrong[0]!r:.80}"
        )
    return tuple(_unicode(str(text), where) for text in texts)


def numbers_in(fields: Mapping[str, Any], where: str) -> tuple[tuple[str, float], ...]:
    """Read the fields of NUMBERS that are there and not empty, also out of texts.

    where: for messages. Raises ValueError for what is no such number.
    """
    return tuple(
        (name, number_in(name, fields[name], where))
        for name in NUMBERS
        if name in fields and fields[name] not in (None, "")
    )


def number_in(name: str, value: Any, where: str) -> float:
    """Read the value of a field of NUMBERS; ValueError for what is no such number."""
    least, kind = NUMBERS[name]
    whole = issubclass(kind, np.integer)
    try:
        number = float("" if isinstance(value, bool) else value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not least <= number <= LARGEST or (whole and number != int(number)):
        what = "a whole number" if whole else "a number"
        raise ValueError(
            f"{where}: {name} = {value!r:.80} should be {what} between {least} and {LARGEST}"
        )
    return number


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text!r:.80} is not valid Unicode ({error})") from error
    return text
