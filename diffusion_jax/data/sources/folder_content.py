"""What the builders of a user's folder share: its fingerprint, its texts, and files left out."""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tensorflow_datasets as tfds

from diffusion_jax.data.sources.file_hashes import hash_files
from diffusion_jax.data.sources.folder_scan import Item, Scan
from diffusion_jax.data.sources.folder_texts import NUMBERS
from diffusion_jax.data.sources.packages import require_packages
from diffusion_jax.wording import counted

# How the path of a folder inside a package begins.
_PACKAGE = "package:"

_log = logging.getLogger(__name__)


@runtime_checkable
class TextOptions(Protocol):
    """What a builder's configuration says of its folder.

    That is its classes, whether there are captions, and the numbers that say how much a record
    counts, see folder_texts.NUMBERS.
    """

    classes: tuple[str, ...]
    has_captions: bool
    several_captions: bool
    numbers: tuple[str, ...]


@runtime_checkable
class FolderOptions(TextOptions, Protocol):
    """What it says besides of where the folder is, and of its content, a hash."""

    folder: str
    content: str


def find_root(folder: str | os.PathLike[str]) -> Path:
    """Resolve the path of a user's folder.

    "package:name/rest" is a folder inside an installed package, which is not imported.

    Raises:
        ValueError: it is no path.
        ModuleNotFoundError: no such package.
    """
    path = os.path.expanduser(folder)
    if str(path).startswith(_PACKAGE):
        name, _, rest = str(path).removeprefix(_PACKAGE).partition("/")
        path = str(require_packages(str(folder), {name: name})[0] / rest)
    if not path or "\0" in str(path):
        raise ValueError(f"folder = {path!r} should be the path of a folder")
    return Path(os.path.realpath(path))


@functools.cache
def say_once(line: str) -> None:
    """Log a line unless it was logged before: each split of a folder is opened on its own."""
    _log.info(line)


def memory_of(root: Path, place: Path) -> Path:
    """Name the file that remembers the hashes of a folder. place: where it is prepared."""
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return place / ".hashes" / f"{digest}.json"


def name_of(root: Path, variant: str) -> str:
    """Name a configuration of a builder by its folder and by all that it depends on."""
    stem = re.sub(r"[^A-Za-z0-9]+", "_", root.name)[:40]
    return f"{stem}-{hashlib.sha256(variant.encode()).hexdigest()[:12]}"


def fingerprint(found: Scan, memory: Path) -> tuple[dict[Path, str], str]:
    """Hash names, classes, captions and bytes of all files, but not where they lie or how old.

    Returns the hash of each file, and of everything. The folder of a split is part of the names.
    """
    files = {
        item.name: [*item.files(), *(path for _, path in item.images)] for item in found.items()
    }
    paths = [path for own in files.values() for path in own]
    hashes = dict(zip(paths, hash_files(paths, memory), strict=True))
    digest = hashlib.sha256()
    for item in found.items():
        own = [hashes[path] for path in files[item.name]]
        facts = [item.name, item.label, item.captions, *own, *(name for name, _ in item.images)]
        facts += [*item.numbers, *(item.cameras or ())]
        digest.update(json.dumps(facts).encode())
    return hashes, digest.hexdigest()[:16]


def text_options(found: Scan) -> dict[str, Any]:
    """Find the TextOptions of a folder."""
    captions = [item.captions for item in found.items() if item.captions is not None]
    return {
        "classes": found.classes(),
        "has_captions": bool(captions),
        "several_captions": any(len(texts) != 1 for texts in captions),
        "numbers": found.numbers(),
    }


def text_features(options: TextOptions) -> dict[str, Any]:
    """Describe to TFDS class, captions and numbers of a record, as far as there are any."""
    features: dict[str, Any] = {
        name: tfds.features.Scalar(NUMBERS[name].kind) for name in options.numbers
    }
    if options.classes:
        features["label"] = tfds.features.ClassLabel(names=list(options.classes))
    if options.has_captions:
        text = tfds.features.Text()
        features["caption"] = tfds.features.Sequence(text) if options.several_captions else text
    return features


def folder_info(
    builder: tfds.core.DatasetBuilder,
    options: FolderOptions,
    what: str,
    features: Mapping[str, Any],
) -> tfds.core.DatasetInfo:
    """Describe to TFDS the records of a folder. what: they are; features: beside name and texts."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=f"{what} {options.folder}.",
        features=tfds.features.FeaturesDict(
            {**features, "file_name": tfds.features.Text(), **text_features(options)}
        ),
        metadata=tfds.core.MetadataDict({"skipped": [], "content": options.content}),
    )


def texts_of(item: Item, *, several: bool, numbers: Sequence[str] = ()) -> dict[str, Any]:
    """Give class, captions and numbers of a record, as text_features describes them."""
    own = {**dict.fromkeys(numbers, 1.0), **dict(item.numbers)}
    fields: dict[str, Any] = {name: NUMBERS[name].kind(own[name]) for name in numbers}
    if item.label is not None:
        fields["label"] = item.label
    if item.captions is not None:
        fields["caption"] = list(item.captions) if several else item.captions[0]
    return fields


@runtime_checkable
class Named(Protocol):
    """What a user's folder holds: a file, or a folder, and its name within the whole."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def name(self) -> str:
        """What it is called within the whole folder."""
        ...


def skip(
    info: tfds.core.DatasetInfo, item: Named, error: Exception, max_corrupt: int, kind: str
) -> None:
    """Note in the metadata of a data set that a file was left out.

    Raises:
        ValueError: there are more than max_corrupt of them.
    """
    metadata: Mapping[str, Any] | None = info.metadata
    assert metadata is not None  # _info gives it
    skipped = metadata["skipped"]
    skipped.append(item.name)
    _log.warning("skipped %s: %s", item.path, error)
    if len(skipped) > max_corrupt:
        raise ValueError(
            f"{item.path}: {error}; that makes "
            f"{counted(len(skipped), f'unreadable {kind}', f'unreadable {kind}s')} "
            f"({', '.join(skipped[-5:])}), max_corrupt = {max_corrupt} allows no more"
        ) from error
