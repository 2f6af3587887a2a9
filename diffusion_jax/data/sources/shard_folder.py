"""TFDS builder: images inside shards, with classes and captions, prepared for any order."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from diffusion_jax.data import transforms
from diffusion_jax.data.progress import log_progress
from diffusion_jax.data.sources.file_hashes import hash_files
from diffusion_jax.data.sources.folder_content import (
    find_root,
    folder_info,
    memory_of,
    name_of,
    say_once,
    skip,
    texts_of,
)
from diffusion_jax.data.sources.folder_scan import SPLITS, Item
from diffusion_jax.data.sources.folder_texts import NUMBERS
from diffusion_jax.wording import counted

_SPLIT = re.compile(rf"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)


class Sample(NamedTuple):
    """What a shard says of one image. problem: why there is none, "" if there is.

    numbers: how much the image counts, see folder_texts.NUMBERS.
    """

    name: str
    image: bytes = b""
    label: str | None = None
    captions: tuple[str, ...] | None = None
    problem: str = ""
    numbers: tuple[tuple[str, float], ...] = ()


class Format(NamedTuple):
    """A format of shards.

    suffixes: how its files end. read: (file, whether images are wanted) -> its samples in order.
    names: file -> the names of its classes by number, None where it has no list of them.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Path, bool], Iterator[Sample]]
    names: Callable[[Path], tuple[str, ...] | None] = lambda path: None


class Shards(NamedTuple):
    """What was found in a folder of shards. counts: split -> samples."""

    splits: dict[str, list[Path]]
    counts: dict[str, int]
    classes: tuple[str, ...]
    has_captions: bool
    several_captions: bool
    numbers: tuple[str, ...]

    def in_words(self) -> str:
        """Say in one line what the folder is taken for."""
        counts = ", ".join(f"{split} {count}" for split, count in self.counts.items())
        files = counted(sum(map(len, self.splits.values())), "shard", "shards")
        shown = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
        return (
            f"images: {counts} in {files}; "
            f"classes: {f'{len(self.classes)} ({shown})' if self.classes else 'none'}; "
            f"captions: {'inside' if self.has_captions else 'none'}"
            + "".join(f"; each with its {name}" for name in self.numbers)
        )


@dataclasses.dataclass(kw_only=True)
class ShardFolderConfig(tfds.core.BuilderConfig):
    """A folder of shards, and what it held when it was scanned."""

    folder: str
    content: str
    classes: tuple[str, ...]
    has_captions: bool
    several_captions: bool
    numbers: tuple[str, ...]
    splits: dict[str, list[Path]]
    format: Format
    max_corrupt: int


class ShardFolder(tfds.core.GeneratorBasedBuilder):
    """A folder of shards as a TFDS data set. Use tar_folder.builder or parquet_folder.builder."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    @property
    def _options(self) -> ShardFolderConfig:
        assert isinstance(self.builder_config, ShardFolderConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Image(shape=(None, None, None))
        return folder_info(
            self, self._options, "Images in the shards of the folder", {"image": image}
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        return {split: self._examples(files) for split, files in self._options.splits.items()}

    def _examples(self, files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
        config, readable = self._options, 0
        for file in log_progress(files, len(files), f"preparing {config.folder}"):
            place = file.relative_to(config.folder).as_posix()
            for number, sample in enumerate(config.format.read(file, True)):
                item = Item(
                    Path(f"{file}/{sample.name}"),  # for messages
                    f"{place}/{sample.name}",
                    sample.label,
                    sample.captions,
                    numbers=sample.numbers,
                )
                try:
                    self._check(sample)
                except transforms.CorruptImageError as error:
                    skip(self.info, item, error, config.max_corrupt, "image")
                    continue
                texts = texts_of(item, several=config.several_captions, numbers=config.numbers)
                readable += 1
                # A name may come twice in a shard; its number does not.
                example = {"image": sample.image, "file_name": item.name, **texts}
                yield f"{place}:{number}", example
        if not readable:
            raise ValueError(f"{config.folder}: none of its images can be read")

    def _check(self, sample: Sample) -> None:
        if sample.problem:
            raise transforms.CorruptImageError(sample.problem)
        if self._options.classes and sample.label is None:
            raise transforms.CorruptImageError("it has no label, and others have one")
        if self._options.has_captions and sample.captions is None:
            raise transforms.CorruptImageError("it has no caption, and others have one")
        transforms.decode(sample.image, 3)

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def scan_shards(folder: str | Path, kind: Format) -> Shards:
    """Find the shards of a folder by split, and what their samples say besides images.

    A shard belongs to the split that its folder or the beginning of its name says (train-0001.tar),
    else to the training split.
    Raises FileNotFoundError for no such folder, ValueError for one without shards or whose shards
    hold no images, and what the format raises for a damaged shard.
    """
    root = find_root(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder = {str(root)!r} is no folder")
    files = sorted(p for p in root.rglob("*") if p.name.lower().endswith(kind.suffixes))
    files = [p for p in files if p.is_file() and not p.name.startswith(".")]
    if not files:
        raise ValueError(f"{root} holds no shards, which end in {', '.join(kind.suffixes)}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(root, file), []).append(file)
    stamps = tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in (p.stat() for p in files))
    found = _scan(root, kind, tuple((split, *own) for split, own in splits.items()), stamps)
    if not any(found.counts.values()):
        raise ValueError(f"{root} holds {counted(len(files), 'shard', 'shards')} without images")
    return found


@functools.lru_cache(maxsize=4)
def _scan(root: Path, kind: Format, splits: tuple[Any, ...], stamps: tuple[Any, ...]) -> Shards:
    """Read what all samples say; stamps: of the files, which are read again when one differs."""
    counts, names = {}, None
    labels, captions, numbers = set(), set(), set()
    for split, *files in splits:
        counts[split] = 0
        for file in files:
            names = kind.names(file) if names is None else names
            for sample in kind.read(file, False):
                counts[split] += not sample.problem
                labels |= {sample.label} - {None}
                numbers |= {name for name, _ in sample.numbers}
                captions |= set() if sample.captions is None else {len(sample.captions)}
    decimal = all(label.isdecimal() for label in labels)
    ordered = tuple(sorted(labels, key=lambda name: (int(name), name) if decimal else name))
    classes = names if names is not None and labels <= set(names) else ordered
    return Shards(
        {split: files for split, *files in splits},
        counts,
        classes if labels else (),
        bool(captions),
        bool(captions - {1}),
        tuple(name for name in NUMBERS if name in numbers),
    )


def shard_builder(
    kind: Format, data_dir: str | Path, folder: str | Path, max_corrupt: int
) -> ShardFolder:
    """Make the builder for a folder of shards; it is prepared again when its content changes."""
    root, found = find_root(folder), scan_shards(folder, kind)
    say_once(f"{root} holds {found.in_words()}")
    files = [file for own in found.splits.values() for file in own]
    hashes = hash_files(files, memory_of(root, Path(data_dir) / "shard_folder"))
    facts = [[file.relative_to(root).as_posix() for file in files], hashes, found.classes]
    facts += found.numbers
    content = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    config = ShardFolderConfig(
        name=name_of(root, f"{kind.name} {max_corrupt} {content}"),
        folder=str(root),
        content=content,
        classes=found.classes,
        has_captions=found.has_captions,
        several_captions=found.several_captions,
        numbers=found.numbers,
        splits=found.splits,
        format=kind,
        max_corrupt=max_corrupt,
    )
    return ShardFolder(data_dir=data_dir, config=config)


def _split_of(root: Path, file: Path) -> str:
    for part in (*file.relative_to(root).parts[:-1], file.name):
        match = _SPLIT.match(part)
        if match is not None:
            return SPLITS[match[1].lower()]
    return "train"
