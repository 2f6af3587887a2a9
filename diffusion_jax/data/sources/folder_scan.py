"""What a folder of images or videos is taken for: splits, and the class and captions of each."""

import collections
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from diffusion_jax.data.sources.cameras import Cameras
from diffusion_jax.data.sources.folder_texts import (
    METADATA,
    NUMBERS,
    find_metadata,
    number_in,
    read_captions,
    read_metadata,
)
from diffusion_jax.wording import counted

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm",
)  # fmt: skip
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".m2v", ".ts", ".mts",
    ".m2ts", ".vob", ".wmv", ".asf", ".flv", ".f4v", ".ogv", ".3gp", ".3g2", ".mxf", ".y4m", ".dv",
)  # fmt: skip
# How the files end that other sources read.
SHARDS = {"tar_folder": (".tar", ".tar.gz", ".tgz"), "parquet_folder": (".parquet",)}
CAPTIONS = ("auto", "none", "txt", "metadata")
# Endings of files with the captions of the image that they lie beside; the first is preferred.
TEXTS = (".txt", ".caption")
# How the name of an image's mask ends, which lies beside it, and the column that it becomes.
MASK_ENDING, MASK_COLUMN = "-masklabel.png", "mask_image"
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
# A folder whose images come several times, and the name of their class.
_REPEATS = re.compile(r"([0-9]+)_(.+)")
# Folders that operating systems and archives add, in small letters.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "lost+found")


class Kind(NamedTuple):
    """What a folder is searched for.

    one, many: its names in messages. suffixes: how its files end. frames: whether a folder counts
    as one of them that holds two images or more, and neither folders nor such files. videos:
    whether they may be videos, whose frames have cameras.
    """

    one: str
    many: str
    suffixes: tuple[str, ...]
    frames: bool = False
    videos: bool = False

    def fits(self, path: Path) -> bool:
        """Tell whether a path is of this kind."""
        return path.suffix.lower() in self.suffixes or (self.frames and self.is_clip(path))

    def is_clip(self, path: Path) -> bool:
        """Tell whether a path is a folder whose images are the frames of one clip."""
        if not path.is_dir():
            return False
        entries = _entries(path)
        videos = any(Path(entry.name).suffix.lower() in self.suffixes for entry in entries)
        return not videos and not any(map(_is_dir, entries)) and len(frames_of(path)) > 1


IMAGES = Kind("image", "images", SUFFIXES)


class Item(NamedTuple):
    """One image or video: its path, its name within the folder, and what is known about it.

    images: its other images, by column. numbers: how much it counts, see folder_texts.NUMBERS.
    cameras: of its frames.
    """

    path: Path
    name: str
    label: str | None
    captions: tuple[str, ...] | None
    images: tuple[tuple[str, Path], ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()
    cameras: Cameras | None = None

    def files(self) -> list[Path]:
        """List the files that it consists of: of a folder the images, in the order of numbers."""
        return frames_of(self.path) if self.path.is_dir() else [self.path]


class Scan(NamedTuple):
    """What was found in a folder.

    splits: split -> its images. captions: the kind of file that they come from, "" for none.
    ignored: an ending, or in words what else the files are -> how many such files were left out.
    kind: what was searched for.
    """

    splits: Mapping[str, list[Item]]
    captions: str
    ignored: Mapping[str, int]
    kind: Kind = IMAGES

    def items(self) -> list[Item]:
        """List the images of all splits."""
        return [item for part in self.splits.values() for item in part]

    def classes(self) -> tuple[str, ...]:
        """Name the classes in the order of their numbers; 10 comes after 9."""
        names = {item.label for item in self.items() if item.label is not None}
        numbers = all(name.isdecimal() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name), name) if numbers else name))

    def columns(self) -> tuple[str, ...]:
        """Name the other images that each image has."""
        return tuple(name for name, _ in self.items()[0].images)

    def numbers(self) -> tuple[str, ...]:
        """Name the numbers that say of any of the images how much it counts."""
        found = {name for item in self.items() for name, _ in item.numbers}
        return tuple(name for name in NUMBERS if name in found)

    def has_cameras(self) -> bool:
        """Tell whether the cameras of their frames are known."""
        return any(item.cameras is not None for item in self.items())

    def in_words(self) -> str:
        """Say in one line what the folder is taken for."""
        classes = self.classes()
        counts = ", ".join(f"{split} {len(part)}" for split, part in self.splits.items())
        shown = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        ignored = ", ".join(f"{count} {what}" for what, count in sorted(self.ignored.items()))
        return (
            f"{self.kind.many}: {counts}; "
            f"classes: {f'{len(classes)} ({shown})' if classes else 'none'}; "
            f"captions: {self.captions or 'none'}; "
            + "".join(f"each with its {name}; " for name in self.numbers())
            + ("each with its cameras; " if self.has_cameras() else "")
            + f"ignored files: {ignored or 'none'}"
        )


def scan(
    root: Path, *, caption: str = "auto", folder_repeats: bool = False, kind: Kind = IMAGES
) -> Scan:
    """Find the images or videos of a folder by split, without opening them.

    caption, folder_repeats: see image_folder.

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
    parts = _parts(root, kind)
    outside = (
        _files(root, kind, ignored, leave_out=parts.values()) if root not in parts.values() else []
    )
    lost = find_metadata(root) if outside and caption in ("auto", "metadata") else None
    if lost is not None:
        raise ValueError(
            f"{lost} lies beside the folders of the splits ({', '.join(parts)}); put one into each "
            "of them, or set caption = 'none'"
        )
    for path in outside:
        stray = f"{kind.many} outside of the splits" if kind.fits(path) else _ending(path)
        ignored[stray] += 1
    found = {split: _scan_part(root, part, caption, kind, ignored) for split, part in parts.items()}
    splits = {split: items for split, (items, _) in found.items()}
    sources = ", ".join(sorted({source for _, source in found.values() if source}))
    if folder_repeats:
        splits = {s: [_counted(root, parts[s], i) for i in items] for s, items in splits.items()}
    result = Scan(splits, sources, ignored, kind)
    _check_all_or_none(root, result)
    _check_labels(root, result.classes())
    return result


def _counted(root: Path, part: Path, item: Item) -> Item:
    """Take the repeats of an image out of the name of its folder, such as 10_fox."""
    top = item.path.relative_to(part).parts[0]
    match = _REPEATS.fullmatch(top)
    if match is None or item.path.parent == part or "repeats" in dict(item.numbers):
        return item
    repeats = number_in("repeats", match[1], f"{part / top}")
    label = match[2] if item.label == top else item.label
    return item._replace(label=label, numbers=(("repeats", repeats), *item.numbers))


def _parts(root: Path, kind: Kind) -> dict[str, Path]:
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
    classes = len(parts) == 1 and any(_holds(path, kind) for path in others)
    return {"train": root} if "train" not in parts or classes else parts


def _scan_part(
    root: Path, part: Path, caption: str, kind: Kind, ignored: collections.Counter[str]
) -> tuple[list[Item], str]:
    """Find the images of one split, and where their captions come from."""
    files = _files(part, kind, ignored)
    metadata = find_metadata(part)
    if caption == "metadata" and metadata is None:
        raise FileNotFoundError(
            f"caption = 'metadata' needs the file {part / METADATA[0]}, with one line "
            f'{{"file_name": "a.png", "caption": "a red fox"}} per {kind.one}'
        )
    if metadata is not None and caption in ("auto", "metadata"):
        also = kind.is_clip if kind.frames else None
        rows = read_metadata(metadata, also=also, of_videos=kind.videos)
        items = [Item(row.path, _name(root, row.path), *row[1:]) for row in rows]
        if caption == "metadata" and items[0].captions is None:
            raise ValueError(
                f'{metadata} gives {items[0].name} no "caption" and no "text"; add one to every '
                "line, or leave caption = 'auto'"
            )
        beside = [path for item in items for _, path in item.images]
        used = {metadata, *(item.path for item in items), *beside}
        source = "" if items[0].captions is None else metadata.name
    else:
        items, used, source = _without_metadata(root, part, caption, kind, files)
    ignored.update(_ending(path) for path in files if path not in used)
    return items, source


def _without_metadata(
    root: Path, part: Path, caption: str, kind: Kind, files: list[Path]
) -> tuple[list[Item], set[Path], str]:
    """Find the images of one split, the files that were used, and where captions come from."""
    masks = set() if kind.frames else {path for path in files if path.name.endswith(MASK_ENDING)}
    paths = [path for path in files if kind.fits(path) and path not in masks]
    if not paths:
        folders = "; nor a folder of images, which would be a clip" if kind.frames else ""
        raise ValueError(
            f"{part} holds no {kind.many}, which end in {', '.join(kind.suffixes)}{folders}"
            f"{_other_source(part)}"
        )
    beside = [[_beside(path, ending) for ending in TEXTS] for path in paths]
    texts = [next((t for t in found if t.is_file()), found[0]) for found in beside]
    missing = [text for text in texts if not text.is_file()]
    if caption == "txt" and missing:
        raise FileNotFoundError(
            f"caption = 'txt' needs a text file beside each {kind.one} (it may be empty), but "
            f"{counted(len(missing), f'of {len(texts)} is', f'of {len(texts)} are')} not there, "
            f"such as {missing[0]}"
        )
    loose = [path for path in paths if path.parent == part]
    if loose and len(loose) < len(paths) and caption != "txt":
        raise ValueError(
            f"{part} holds {kind.many}, such as {loose[0].name}, beside folders of {kind.many}; "
            f"put every {kind.one} into the folder of its class, or none"
        )
    has_texts = caption == "txt" or (caption == "auto" and not missing)
    has_classes = caption != "txt" and not loose
    items = [
        Item(
            path,
            _name(root, path),
            path.relative_to(part).parts[0] if has_classes else None,
            read_captions(text) if has_texts else None,
            ((MASK_COLUMN, path.with_name(path.stem + MASK_ENDING)),) if masks else (),
        )
        for path, text in zip(paths, texts, strict=True)
    ]
    lost = [item.images[0][1] for item in items if masks and item.images[0][1] not in masks]
    if lost:
        raise FileNotFoundError(
            f"{len(masks)} of the {len(paths)} {kind.many} in {part} come with a mask, but "
            f"{counted(len(lost), 'mask is', 'masks are')} not there, such as {lost[0]}; give each "
            "a mask or none"
        )
    used = {*paths, *masks, *(texts if has_texts else ())}
    return items, used, "text files" if has_texts else ""


def _other_source(part: Path) -> str:
    """Name the source that reads the shards of a folder, if it holds any."""
    endings = {ending: name for name, known in SHARDS.items() for ending in known}
    for ending, name in endings.items():
        if any(path.name.lower().endswith(ending) for path in part.iterdir()):
            return f"; data.source.name = {name!r} reads its {ending} files"
    return ""


def _check_all_or_none(root: Path, found: Scan) -> None:
    items = found.items()
    expected = {
        "label": "label",
        "captions": "caption",
        "cameras": "list of elevations and azimuths",
    }
    for field, name in expected.items():
        missing = [item for item in items if getattr(item, field) is None]
        if missing and len(missing) < len(items):
            raise ValueError(
                f"{missing[0].path} has no {name}, but other {found.kind.many} of {root} have one; "
                f"give each a {name} or none"
            )
    for item in items:
        names = tuple(name for name, _ in item.images)
        if names != found.columns():
            raise ValueError(
                f"{item.path} has the images {list(names)}, but {items[0].path} has "
                f"{list(found.columns())}; give each the same"
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
    folder: Path,
    kind: Kind,
    ignored: collections.Counter[str],
    *,
    leave_out: Iterable[Path] = (),
) -> list[Path]:
    """List the regular files of a folder and its sub-folders in order, and count the others.

    A folder of frames stands for its files.
    """
    files = []
    whole = kind.is_clip if kind.frames else lambda path: False
    for entry in _walk(folder, frozenset(), frozenset(leave_out), whole):
        path = Path(entry.path)
        if _hidden(entry.name):
            ignored["hidden"] += 1
        elif path.is_file() or path.is_dir():
            files.append(path)
        else:
            dead = entry.is_symlink() and not path.exists()
            ignored["dead links" if dead else "no regular files"] += 1
    return sorted(files)


def _walk(
    folder: Path,
    above: frozenset[tuple[int, int]],
    leave_out: frozenset[Path],
    whole: Callable[[Path], bool],
) -> Iterator[os.DirEntry[str]]:
    """Yield all but folders, through links, but not round in circles or into hidden folders.

    whole: tells which folders are yielded themselves.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        path = Path(entry.path)
        if not _is_dir(entry):
            yield entry
        elif not _hidden(entry.name) and path not in leave_out:
            if whole(path):
                yield entry
            else:
                yield from _walk(path, above | {here}, leave_out, whole)


def frames_of(folder: Path) -> list[Path]:
    """List the images of a folder in the order of their numbers, without the hidden ones."""
    paths = [Path(entry.path) for entry in _entries(folder) if not _hidden(entry.name)]
    images = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(images, key=lambda path: natural(path.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Make a key that sorts frame 9 before frame 10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


def _beside(path: Path, ending: str) -> Path:
    """Name the text file of an image, a video or a folder of frames."""
    return path.with_name(path.name + ending) if path.is_dir() else path.with_suffix(ending)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be listed ({error.strerror})") from error


def _is_dir(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path)  # entry.is_dir() raises for a link that leads to itself


def _holds(folder: Path, kind: Kind) -> bool:
    found = _files(folder, kind, collections.Counter())
    return (kind.frames and kind.is_clip(folder)) or any(map(kind.fits, found))


def _hidden(name: str) -> bool:
    return name[0] == "." or name.lower() in _SYSTEM_FOLDERS


def _ending(path: Path) -> str:
    return path.suffix.lower() or "without an ending"


def _name(root: Path, path: Path) -> str:
    """Name a file within the folder; bytes that are not UTF-8 are written in hexadecimal."""
    name = path.relative_to(root).as_posix()
    return os.fsencode(name).decode(errors="backslashreplace")
