"""TFDS builder: a user's folder of images, with classes from folders or captions from files."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from diffusion_jax.data import transforms
from diffusion_jax.data.progress import log_progress
from diffusion_jax.data.sources.file_hashes import hash_files
from diffusion_jax.data.sources.folder_scan import Item, Scan, scan

_log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class ImageFolderConfig(tfds.core.BuilderConfig):
    """A folder and what it held when it was scanned.

    content: its fingerprint. memory: the file that remembers the hashes of its images.
    """

    folder: str
    content: str
    memory: str
    classes: tuple[str, ...]
    has_captions: bool
    several_captions: bool
    caption: str
    max_corrupt: int


class ImageFolder(tfds.core.GeneratorBasedBuilder):
    """A folder of images as a TFDS data set; its configuration name changes with the content.

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
            metadata=tfds.core.MetadataDict({"skipped": [], "content": config.content}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self._options
        found = scan(self._folder, caption=config.caption)
        hashes, content = _fingerprint(found, Path(config.memory))
        if content != config.content:
            raise ValueError(f"{self._folder} changed while it was read; start again")
        return {split: self._examples(items, hashes) for split, items in found.splits.items()}

    @property
    def _folder(self) -> Path:
        return Path(self._options.folder)

    def _examples(
        self, items: list[Item], hashes: Mapping[Path, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        readable = 0
        for item in log_progress(items, len(items), f"preparing {self._folder}"):
            try:
                encoded = item.path.read_bytes()
                if hashlib.sha256(encoded).hexdigest() != hashes[item.path]:
                    raise ValueError(f"{item.path} changed while it was read; start again")
                transforms.decode(encoded, 3)
            except (OSError, transforms.CorruptImageError) as error:
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

    def _skip(self, item: Item, error: Exception) -> None:
        assert self.info.metadata is not None  # _info gives it
        skipped = self.info.metadata["skipped"]
        skipped.append(item.name)
        _log.warning("skipped %s: %s", item.path, error)
        limit = self._options.max_corrupt
        if len(skipped) > limit:
            raise ValueError(
                f"{item.path}: {error}; that makes {len(skipped)} unreadable images "
                f"({', '.join(skipped[-5:])}), max_corrupt = {limit} allows no more"
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
    """Make the builder for a folder of images; it is prepared again whenever its content changes.

    The folder holds images; or one sub-folder per class; or images and captions. Any of these may
    stand inside sub-folders train, validation (val, valid) and test, in small or capital letters;
    what lies beside them is ignored, but train alone beside other folders of images is a class.
    Without train all is the split "train". Links are followed. One line in the log says what the
    folder is taken for, and how many files are ignored, by their endings.

    Args:
        data_dir: where TFDS data sets are prepared.
        folder: the user's folder.
        caption: where captions come from.
            "metadata": a file metadata.jsonl with one object {"file_name": ..., "caption" or
            "text": a text or a list of texts, "label": ...} per line; or a table metadata.csv with
            such columns.
            "txt": beside each image a text file of its name that ends in .txt or .caption, with one
            caption per line; sub-folders then have no meaning.
            "none": nowhere, such files are ignored.
            "auto": the metadata file, which need not have captions, if there is one; else text
            files, if every image has one.
        max_corrupt: unreadable images to leave out with a warning, before it is an error.

    Raises:
        OSError: a folder or a file of texts cannot be read.
        FileNotFoundError: no such folder, an image without its text file, no metadata file, or it
            names a file that is not there.
        ValueError: no images, images beside class folders, a bad line in the metadata file, or
            another value of caption.
    """
    path = os.path.expanduser(folder)
    if not path or "\0" in str(path):
        raise ValueError(f"folder = {path!r} should be the path of a folder")
    root = Path(os.path.realpath(path))
    found = scan(root, caption=caption)
    _say_once(f"{root} holds {found.in_words()}")
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    memory = Path(data_dir) / "image_folder" / ".hashes" / f"{digest}.json"
    _, content = _fingerprint(found, memory)
    captions = [item.captions for item in found.items() if item.captions is not None]
    stem = re.sub(r"[^A-Za-z0-9]+", "_", root.name)[:40]
    variant = hashlib.sha256(f"{max_corrupt} {content}".encode()).hexdigest()[:12]
    config = ImageFolderConfig(
        name=f"{stem}-{variant}",
        folder=str(root),
        content=content,
        memory=str(memory),
        classes=found.classes(),
        has_captions=bool(captions),
        several_captions=any(len(texts) != 1 for texts in captions),
        caption=caption,
        max_corrupt=max_corrupt,
    )
    return ImageFolder(data_dir=data_dir, config=config)


@functools.cache
def _say_once(line: str) -> None:
    """Log a line unless it was logged before: each split of a folder is opened on its own."""
    _log.info(line)


def _fingerprint(found: Scan, memory: Path) -> tuple[dict[Path, str], str]:
    """Hash names, classes, captions and bytes of all images, but not where they lie or how old.

    Returns the hash of each file, and of everything. The folder of a split is part of the names.
    """
    paths = [item.path for item in found.items()]
    hashes = dict(zip(paths, hash_files(paths, memory), strict=True))
    digest = hashlib.sha256()
    for item in found.items():
        facts = [item.name, item.label, item.captions, hashes[item.path]]
        digest.update(json.dumps(facts).encode())
    return hashes, digest.hexdigest()[:16]
