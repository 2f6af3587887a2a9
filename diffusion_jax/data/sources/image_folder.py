"""TFDS builder: a user's folder of images, with classes from folders or captions from files."""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from diffusion_jax.data import transforms
from diffusion_jax.data.progress import log_progress

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
METADATA = "metadata.jsonl"
CAPTIONS = ("auto", "none", "txt", "metadata")
# Folder name -> split.
SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}

_log = logging.getLogger(__name__)


class Item(NamedTuple):
    """One image file: its path, its name within the folder, and what is known about it."""

    path: Path
    name: str
    label: str | None
    captions: tuple[str, ...] | None


@dataclasses.dataclass(kw_only=True)
class ImageFolderConfig(tfds.core.BuilderConfig):
    """Which folder, as it was when it was looked at."""

    folder: str
    classes: tuple[str, ...]
    has_captions: bool
    several_captions: bool
    caption: str
    max_corrupt: int


class ImageFolder(tfds.core.GeneratorBasedBuilder):
    """A folder of images as a TFDS data set; its configuration name changes with the folder.

    Images are stored as they are, byte for byte. Use `builder` to make one.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    @property
    def _options(self) -> ImageFolderConfig:
        assert isinstance(self.builder_config, ImageFolderConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        config = self._options
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=(None, None, None)),
            "file_name": tfds.features.Text(),
        }
        if config.classes:
            features["label"] = tfds.features.ClassLabel(names=list(config.classes))
        if config.has_captions:
            text = tfds.features.Text()
            features["caption"] = tfds.features.Sequence(text) if config.several_captions else text
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of the folder {config.folder}.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict({"skipped": []}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        splits = scan(self._folder, caption=self._options.caption)
        return {split: self._examples(items) for split, items in splits.items()}

    @property
    def _folder(self) -> Path:
        return Path(self._options.folder)

    def _examples(self, items: list[Item]) -> Iterator[tuple[str, dict[str, Any]]]:
        readable = 0
        for item in log_progress(items, len(items), f"preparing {self._folder}"):
            encoded = item.path.read_bytes()
            try:
                transforms.decode(encoded, 3)
            except transforms.CorruptImageError as error:
                self._skip(item, error)
                continue
            example = {"image": encoded, "file_name": item.name}
            if item.label is not None:
                example["label"] = item.label
            if item.captions is not None:
                several = self._options.several_captions
                example["caption"] = list(item.captions) if several else item.captions[0]
            readable += 1
            yield item.name, example
        if not readable:
            raise ValueError(f"{self._folder}: none of its {len(items)} images can be read")

    def _skip(self, item: Item, error: transforms.CorruptImageError) -> None:
        assert self.info.metadata is not None  # _info gives it
        skipped = self.info.metadata["skipped"]
        skipped.append(item.name)
        _log.warning("skipped %s: %s", item.path, error)
        limit = self._options.max_corrupt
        if len(skipped) > limit:
            raise ValueError(
                f"{item.path} is {error}; that makes {len(skipped)} unreadable images "
                f"({', '.join(skipped[-5:])}), max_corrupt={limit} allows no more"
            ) from error

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def builder(
    data_dir: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str],
    caption: str = "auto",
    max_corrupt: int = 10,
) -> ImageFolder:
    """A builder for a folder of images; any change of the folder makes it prepare again.

    The folder holds images; or one sub-folder per class; or images and captions. Any of these may
    stand inside sub-folders train, validation (val, valid) and test; without them all is "train".

    Args:
        data_dir: where TFDS data sets are prepared.
        folder: the user's folder.
        caption: where captions come from.
            "metadata": a file metadata.jsonl with one object {"file_name": ..., "caption" or
            "text": a text or a list of texts, "label": ...} per line.
            "txt": beside each image a text file of its name, one caption per line; sub-folders then
            have no meaning.
            "none": nowhere, what such files there are is ignored.
            "auto": metadata.jsonl, which need not have captions, if there is one.
        max_corrupt: unreadable images to leave out with a warning, before it is an error.

    Raises:
        FileNotFoundError: no such folder, an image without its text file, no metadata.jsonl, or it
            names a file that is not there.
        ValueError: no images, images beside class folders, a bad line in metadata.jsonl, or another
            value of caption.
    """
    root = Path(folder).expanduser().resolve()
    splits = scan(root, caption=caption)
    items = [item for part in splits.values() for item in part]
    captions = [item.captions for item in items if item.captions is not None]
    config = ImageFolderConfig(
        name=f"{re.sub(r'[^A-Za-z0-9]+', '_', root.name)[:40]}-{_fingerprint(items, max_corrupt)}",
        folder=str(root),
        classes=_classes(items),
        has_captions=bool(captions),
        several_captions=any(len(texts) != 1 for texts in captions),
        caption=caption,
        max_corrupt=max_corrupt,
    )
    return ImageFolder(data_dir=data_dir, config=config)


def scan(root: Path, *, caption: str = "auto") -> dict[str, list[Item]]:
    """The images of a folder by split, without opening them.

    Raises:
        FileNotFoundError, ValueError: as `builder`.
    """
    if caption not in CAPTIONS:
        raise ValueError(f"caption={caption!r} is unknown, choose one of {', '.join(CAPTIONS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"folder={str(root)!r} is not a folder")
    names = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
    if "train" in names and names <= SPLITS.keys():
        parts = {SPLITS[name]: root / name for name in sorted(names)}
    else:
        parts = {"train": root}
    splits = {split: _scan_part(root, part, caption) for split, part in parts.items()}
    _check_all_or_none(root, [item for part in splits.values() for item in part])
    return splits


def _check_all_or_none(root: Path, items: list[Item]) -> None:
    for field, name in (("label", "label"), ("captions", "caption")):
        missing = [item for item in items if getattr(item, field) is None]
        if missing and len(missing) < len(items):
            raise ValueError(
                f"{missing[0].path} has no {name}, but other images of {root} have one; "
                f"give each a {name} or none"
            )


def _scan_part(root: Path, part: Path, caption: str) -> list[Item]:
    if caption == "metadata" and not (part / METADATA).exists():
        raise FileNotFoundError(
            f"caption='metadata' needs the file {part / METADATA}, with one line "
            '{"file_name": "a.png", "caption": "a red fox"} per image'
        )
    if caption in ("auto", "metadata") and (part / METADATA).exists():
        items = _read_metadata(root, part)
        if caption == "metadata" and items[0].captions is None:
            raise ValueError(
                f'{part / METADATA} gives {items[0].name} no "caption" and no "text"; '
                "add one to every line, or leave caption='auto'"
            )
        return items
    paths = sorted(
        path
        for path in part.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(name[0] == "." for name in path.relative_to(part).parts)
    )
    if not paths:
        raise ValueError(f"{part} holds no images, which end in {', '.join(SUFFIXES)}")
    if caption == "txt":
        texts = _read_captions(paths)
        return [
            Item(path, path.relative_to(root).as_posix(), None, captions)
            for path, captions in zip(paths, texts, strict=True)
        ]
    loose = [path for path in paths if path.parent == part]
    if loose and len(loose) < len(paths):
        raise ValueError(
            f"{part} holds images, such as {loose[0].name}, beside folders of images; "
            "put every image into the folder of its class, or none"
        )
    return [
        Item(
            path,
            path.relative_to(root).as_posix(),
            None if loose else path.relative_to(part).parts[0],
            None,
        )
        for path in paths
    ]


def _read_captions(paths: list[Path]) -> list[tuple[str, ...]]:
    files = [path.with_suffix(".txt") for path in paths]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"caption='txt' needs a text file beside each image (it may be empty), but "
            f"{len(missing)} of {len(files)} are not there, such as {missing[0]}"
        )
    return [_lines(file) for file in files]


def _lines(file: Path) -> tuple[str, ...]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or ("",)


def _read_metadata(root: Path, part: Path) -> list[Item]:
    items = []
    with (part / METADATA).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                items.append(_read_line(root, part, f"{part / METADATA}:{number}", line))
    if not items:
        raise ValueError(f"{part / METADATA} holds no lines, so there are no images")
    return items


def _read_line(root: Path, part: Path, where: str, line: str) -> Item:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
        raise ValueError(
            f'{where} should be an object with "file_name" and, if known, "caption" and "label", '
            f"got {line.strip()[:80]}"
        )
    path = part / fields["file_name"]
    if not path.is_file():
        raise FileNotFoundError(f"{where} names {fields['file_name']!r}, which is not in {part}")
    label = fields.get("label")
    return Item(
        path,
        path.relative_to(root).as_posix(),
        None if label is None else str(label),
        _captions(fields["caption"] if "caption" in fields else fields.get("text"), where),
    )


def _captions(value: Any, where: str) -> tuple[str, ...] | None:
    """One caption or a list of them; a number may be a caption too."""
    if value is None or value == []:
        return None
    texts = value if isinstance(value, list) else [value]
    wrong = [text for text in texts if not isinstance(text, (str, int, float))]
    if wrong:
        raise ValueError(f"{where}: a caption should be a text or a list of them, got {wrong[0]!r}")
    return tuple(str(text) for text in texts)


def _classes(items: list[Item]) -> tuple[str, ...]:
    names = {item.label for item in items if item.label is not None}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))  # 10 comes after 9
    return tuple(sorted(names))


def _fingerprint(items: list[Item], max_corrupt: int) -> str:
    """Changes when a file, its size, its time or what is known about it does."""
    digest = hashlib.sha256(str(max_corrupt).encode())
    for item in items:
        status = item.path.stat()
        texts = item.captions
        caption = texts[0] if texts is not None and len(texts) == 1 else texts
        facts = [item.name, item.label, caption, status.st_size, status.st_mtime_ns]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:12]
