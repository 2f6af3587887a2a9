"""TFDS builder: a user's folder of images, with classes from folders or captions from files."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from diffusion_jax.data import transforms
from diffusion_jax.data.progress import log_progress
from diffusion_jax.data.sources.folder_content import (
    find_root,
    fingerprint,
    folder_info,
    memory_of,
    name_of,
    say_once,
    skip,
    text_options,
    texts_of,
)
from diffusion_jax.data.sources.folder_scan import Item, scan
from diffusion_jax.wording import counted


@dataclasses.dataclass(kw_only=True)
class ImageFolderConfig(tfds.core.BuilderConfig):
    """A folder and what it held when it was scanned.

    content: its fingerprint. memory: the file that remembers the hashes of its images. columns:
    other images that each image has.
    """

    folder: str
    content: str
    memory: str
    classes: tuple[str, ...]
    has_captions: bool
    several_captions: bool
    numbers: tuple[str, ...]
    caption: str
    folder_repeats: bool
    max_corrupt: int
    columns: tuple[str, ...] = ()


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
        images = {
            name: tfds.features.Image(shape=(None, None, None))
            for name in ("image", *self._options.columns)
        }
        return folder_info(self, self._options, "Images of the folder", images)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self._options
        found = scan(self._folder, caption=config.caption, folder_repeats=config.folder_repeats)
        hashes, content = fingerprint(found, Path(config.memory))
        if content != config.content:
            raise ValueError(f"{self._folder} changed while it was read; start again")
        return {split: self._examples(items, hashes) for split, items in found.splits.items()}

    @property
    def _folder(self) -> Path:
        return Path(self._options.folder)

    def _examples(
        self, items: list[Item], hashes: Mapping[Path, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config, readable = self._options, 0
        for item in log_progress(items, len(items), f"preparing {self._folder}"):
            try:
                files = {"image": item.path, **dict(item.images)}
                images = {name: _read(path, hashes[path]) for name, path in files.items()}
            except (OSError, transforms.CorruptImageError) as error:
                skip(self.info, item, error, config.max_corrupt, "image")
                continue
            texts = texts_of(item, several=config.several_captions, numbers=config.numbers)
            example = {**images, "file_name": item.name, **texts}
            readable += 1
            yield item.name, example
        if not readable:
            images = counted(len(items), "image", "images")
            raise ValueError(f"{self._folder} holds {images}, and none can be read")

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def _read(path: Path, digest: str) -> bytes:
    """Read an image; OSError or CorruptImageError where it is none."""
    encoded = path.read_bytes()
    if hashlib.sha256(encoded).hexdigest() != digest:
        raise ValueError(f"{path} changed while it was read; start again")
    transforms.decode(encoded, 3)
    return encoded


def builder(
    data_dir: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str],
    caption: str = "auto",
    folder_repeats: bool = False,
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
        folder: the user's folder; "package:name/rest" is one inside an installed package.
        caption: where captions come from.
            "metadata": a file metadata.jsonl with one object {"file_name": ..., "caption" or
            "text": a text or a list of texts, "label": ...} per line; or a table metadata.csv with
            such columns. Other images of a line, such as "conditioning_image": "edges/a.png", are
            cut and mirrored as its image is. Numbers "repeats" and "weight", 1 where a line has
            none, count for data.batches.repeats_key and weight_key.
            "txt": beside each image a text file of its name that ends in .txt or .caption, with one
            caption per line; sub-folders then have no meaning.
            "none": nowhere, such files are ignored.
            "auto": the metadata file, which need not have captions, if there is one; else text
            files, if every image has one.
        folder_repeats: the folder 10_fox holds images of the class fox that have 10 repeats, as
            kohya's scripts name folders; other folders have 1.
        max_corrupt: unreadable images to leave out with a warning, before it is an error.

    Raises:
        OSError: a folder or a file of texts cannot be read.
        FileNotFoundError: no such folder, an image without its text file, no metadata file, or it
            names a file that is not there.
        ValueError: no images, images beside class folders, a bad line in the metadata file, or
            another value of caption.
    """
    root = find_root(folder)
    found = scan(root, caption=caption, folder_repeats=folder_repeats)
    say_once(f"{root} holds {found.in_words()}")
    memory = memory_of(root, Path(data_dir) / "image_folder")
    _, content = fingerprint(found, memory)
    config = ImageFolderConfig(
        name=name_of(root, f"{max_corrupt} {content}"),
        folder=str(root),
        content=content,
        memory=str(memory),
        **text_options(found),
        caption=caption,
        folder_repeats=folder_repeats,
        max_corrupt=max_corrupt,
        columns=found.columns(),
    )
    return ImageFolder(data_dir=data_dir, config=config)
