"""What a folder of images is taken for: its splits, and the class and captions of each image."""

import collections
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.data.sources.folder_texts import (
    METADATA,
    find_metadata,
    read_captions,
    read_metadata,
)

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm",
)  # fmt: skip
CAPTIONS = ("auto", "none", "txt", "metadata")
# Endings of files with the captions of the image that they lie beside; the first is preferred.
TEXTS = (".txt", ".caption")
# Folder name in small letters -> split.
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
# Folders that operating systems and archives add, in small letters.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "lost+found")


class Item(NamedTuple):
    """One image file: its path, its name within the folder, and what is known about it."""

    path: Path
    name: str
    label: str | None
    captions: tuple[str, ...] | None


class Scan(NamedTuple):
    """What was found in a folder.

    splits: split -> its images. captions: the kind of file that they come from, "" for none.
    ignored: an ending, or in words what else the files are -> how many such files were left out.
    """

    splits: Mapping[str, list[Item]]
    captions: str
    ignored: Mapping[str, int]

    def items(self) -> list[Item]:
        """List the images of all splits."""
        return [item for part in self.splits.values() for item in part]

    def classes(self) -> tuple[str, ...]:
        """Name the classes in the order of their numbers; 10 comes after 9."""
        names = {item.label for item in self.items() if item.label is not None}
        numbers = all(name.isdecimal() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name), name) if numbers else name))

    def in_words(self) -> str:
        """Say in one line what the folder is taken for."""
        classes = self.classes()
        counts = ", ".join(f"{split} {len(part)}" for split, part in self.splits.items())
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        ignored = ", ".join(f"{count} {what}" for what, count in sorted(self.ignored.items()))
        return (
            f"images: {counts}; classes: {f'{len(classes)} ({shown})' if classes else 'none'}; "
            f"captions: {self.captions or 'none'}; ignored files: {ignored or 'none'}"
        )


def scan(root: Path, *, caption: str = "auto") -> Scan:
    """Find the images of a folder by split, without opening them. caption: see image_folder.

    Links to files and folders are followed.

    Raises:
        FileNotFoundError, ValueError: as image_folder.builder.
    """
    if caption not in CAPTIONS:
        raise ValueError(f"caption = {caption!r} is unknown; choose from {', '.join(CAPTIONS)}")
    if root.is_file():
        raise NotADirectoryError(f"folder = {str(root)!r} is a file and should be a folder")
    if not root.is_dir():
        raise FileNotFoundError(f"folder = {str(root)!r} is no folder")
    ignored: collections.Counter[str] = collections.Counter()
    parts = _parts(root)
    outside = _files(root, ignored, leave_out=parts.values()) if root not in parts.values() else []
    lost = find_metadata(root) if outside and caption in ("auto", "metadata") else None
    if lost is not None:
        raise ValueError(
            f"{lost} lies beside the folders of the splits ({', '.join(parts)}); put one into each "
            "of them, or set caption = 'none'"
        )
    for path in outside:
        image = path.suffix.lower() in SUFFIXES
        ignored["images outside of the splits" if image else _ending(path)] += 1
    found = {split: _scan_part(root, part, caption, ignored) for split, part in parts.items()}
    splits = {split: items for split, (items, _) in found.items()}
    sources = ", ".join(sorted({source for _, source in found.values() if source}))
    result = Scan(splits, sources, ignored)
    _check_all_or_none(root, result.items())
    _check_labels(root, result.classes())
    return result


def _parts(root: Path) -> dict[str, Path]:
    """Map each split to its folder; without folders for splits, all is the split train."""
    folders = [Path(e.path) for e in _entries(root) if _is_dir(e) and not _hidden(e.name)]
    parts: dict[str, Path] = {}
    for path in sorted(folders):
        split = SPLITS.get(path.name.lower())
        if split in parts:
            raise ValueError(
                f"{parts[split]} and {path} are both the split {split}; join them or rename one"
            )
        if split is not None:
            parts[split] = path
    others = [path for path in folders if path not in parts.values()]
    # Beside classes, "train" is a class too.
    classes = len(parts) == 1 and any(_images(path) for path in others)
    return {"train": root} if "train" not in parts or classes else parts


def _scan_part(
    root: Path, part: Path, caption: str, ignored: collections.Counter[str]
) -> tuple[list[Item], str]:
    """Find the images of one split, and where their captions come from."""
    files = _files(part, ignored)
    metadata = find_metadata(part)
    if caption == "metadata" and metadata is None:
        raise FileNotFoundError(
            f"caption = 'metadata' needs the file {part / METADATA[0]}, with one line "
            '{"file_name": "a.png", "caption": "a red fox"} per image'
        )
    if metadata is not None and caption in ("auto", "metadata"):
        items = [Item(row.path, _name(root, row.path), *row[1:]) for row in read_metadata(metadata)]
        if caption == "metadata" and items[0].captions is None:
            raise ValueError(
                f'{metadata} gives {items[0].name} no "caption" and no "text"; add one to every '
                "line, or leave caption = 'auto'"
            )
        used = {metadata, *(item.path for item in items)}
        source = "" if items[0].captions is None else metadata.name
    else:
        items, used, source = _without_metadata(root, part, caption, files)
    ignored.update(_ending(path) for path in files if path not in used)
    return items, source


def _without_metadata(
    root: Path, part: Path, caption: str, files: list[Path]
) -> tuple[list[Item], set[Path], str]:
    """Find the images of one split, the files that were used, and where captions come from."""
    paths = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(f"{part} holds no images, which end in {', '.join(SUFFIXES)}")
    beside = [[path.with_suffix(ending) for ending in TEXTS] for path in paths]
    texts = [next((t for t in found if t.is_file()), found[0]) for found in beside]
    missing = [text for text in texts if not text.is_file()]
    if caption == "txt" and missing:
        raise FileNotFoundError(
            f"caption = 'txt' needs a text file beside each image (it may be empty), but "
            f"{len(missing)} of {len(texts)} are not there, such as {missing[0]}"
        )
    loose = [path for path in paths if path.parent == part]
    if loose and len(loose) < len(paths) and caption != "txt":
        raise ValueError(
            f"{part} holds images, such as {loose[0].name}, beside folders of images; "
            "put every image into the folder of its class, or none"
        )
    has_texts = caption == "txt" or (caption == "auto" and not missing)
    has_classes = caption != "txt" and not loose
    items = [
        Item(
            path,
            _name(root, path),
            path.relative_to(part).parts[0] if has_classes else None,
            read_captions(text) if has_texts else None,
        )
        for path, text in zip(paths, texts, strict=True)
    ]
    return items, {*paths, *(texts if has_texts else ())}, "text files" if has_texts else ""


def _check_all_or_none(root: Path, items: list[Item]) -> None:
    for field, name in (("label", "label"), ("captions", "caption")):
        missing = [item for item in items if getattr(item, field) is None]
        if missing and len(missing) < len(items):
            raise ValueError(
                f"{missing[0].path} has no {name}, but other images of {root} have one; "
                f"give each a {name} or none"
            )


def _check_labels(root: Path, classes: tuple[str, ...]) -> None:
    """Raise ValueError for a class whose name TFDS, which writes one a line, would change."""
    for name in classes:
        if name != name.encode(errors="replace").decode() or [name] != name.strip().splitlines():
            raise ValueError(
                f"the class {name!r} of {root} should be named by one line of valid Unicode, "
                "without spaces at its ends; rename it"
            )


def _files(
    folder: Path, ignored: collections.Counter[str], *, leave_out: Iterable[Path] = ()
) -> list[Path]:
    """List the regular files of a folder and its sub-folders in order, and count the others."""
    files = []
    for entry in _walk(folder, frozenset(), frozenset(leave_out)):
        path = Path(entry.path)
        if _hidden(entry.name):
            ignored["hidden"] += 1
        elif path.is_file():
            files.append(path)
        else:
            dead = entry.is_symlink() and not path.exists()
            ignored["dead links" if dead else "no regular files"] += 1
    return sorted(files)


def _walk(
    folder: Path, above: frozenset[tuple[int, int]], leave_out: frozenset[Path]
) -> Iterator[os.DirEntry[str]]:
    """Yield all but folders, through links, but not round in circles or into hidden folders."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if not _is_dir(entry):
            yield entry
        elif not _hidden(entry.name) and Path(entry.path) not in leave_out:
            yield from _walk(Path(entry.path), above | {here}, leave_out)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be listed ({error.strerror})") from error


def _is_dir(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path)  # entry.is_dir() raises for a link that leads to itself


def _images(folder: Path) -> bool:
    found = _files(folder, collections.Counter())
    return any(path.suffix.lower() in SUFFIXES for path in found)


def _hidden(name: str) -> bool:
    return name[0] == "." or name.lower() in _SYSTEM_FOLDERS


def _ending(path: Path) -> str:
    return path.suffix.lower() or "without an ending"


def _name(root: Path, path: Path) -> str:
    """Name a file within the folder; bytes that are not UTF-8 are written in hexadecimal."""
    name = path.relative_to(root).as_posix()
    return os.fsencode(name).decode(errors="backslashreplace")
