"""TFDS builder: a user's folder of objects, each filmed by several cameras at once.

A record holds num_frames consecutive times: every view of the first one, then every view of the
next, as JPEG or PNG, and where the camera of each frame is. Training takes clips out of it, as it
does of records of video_folder.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from diffusion_jax.data import transforms
from diffusion_jax.data.records import VIEWS
from diffusion_jax.data.sources.cameras import (
    AZIMUTHS,
    ELEVATIONS,
    Cameras,
    check_count,
    find_cameras,
    read_cameras,
)
from diffusion_jax.data.sources.folder_content import (
    find_root,
    fingerprint,
    folder_info,
    memory_of,
    name_of,
    say_once,
)
from diffusion_jax.data.sources.folder_scan import VIDEO_SUFFIXES, Item, Kind, Scan, natural, scan
from diffusion_jax.data.sources.stored_frames import (
    check_frame_options,
    cut,
    encoded,
    open_item,
    records_of,
)
from diffusion_jax.data.sources.video_files import CorruptVideoError
from diffusion_jax.data.sources.video_folder import camera_feature
from diffusion_jax.wording import counted

KIND = Kind("view", "views", VIDEO_SUFFIXES, frames=True)
_DECIDING = ("num_frames", "hop", "fps", "short_side", "encoding")


@dataclasses.dataclass(kw_only=True)
class ViewFolderConfig(tfds.core.BuilderConfig):
    """A folder, what it held when it was scanned, and how its videos become records.

    content: the hash of its files and of the options that decide about records. memory: the file
    that remembers the hashes of its files.
    """

    folder: str
    content: str
    memory: str
    num_frames: int
    hop: int
    fps: float | None
    short_side: int
    encoding: str
    max_corrupt: int
    classes: tuple[str, ...] = ()
    has_captions: bool = False
    several_captions: bool = False
    numbers: tuple[str, ...] = ()


class Thing(NamedTuple):
    """An object: its folder, its name within the whole, its views in order, and their cameras."""

    path: Path
    name: str
    views: tuple[Item, ...]
    cameras: Cameras


class ViewFolder(tfds.core.GeneratorBasedBuilder):
    """A folder of objects as a TFDS data set; its configuration name changes with the content.

    Use `builder` to make one.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    @property
    def _options(self) -> ViewFolderConfig:
        assert isinstance(self.builder_config, ViewFolderConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        frame = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = {
            "video": tfds.features.Sequence(frame),
            VIEWS: tfds.features.Scalar(np.int64, doc="views of each time in the video"),
            "start": tfds.features.Scalar(np.int64, doc="number of the first time"),
            ELEVATIONS: camera_feature(),
            AZIMUTHS: camera_feature(),
        }
        return folder_info(
            self, self._options, "Objects of the folder, from several sides", features
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self._options
        found = _scan(Path(config.folder))
        things = {split: _things(found, split, Path(config.folder)) for split in found.splits}
        if _content(found, things, Path(config.memory), config) != config.content:
            raise ValueError(f"{config.folder} changed while it was read; start again")
        return {split: self._examples(own) for split, own in things.items()}

    def _examples(self, things: Sequence[Thing]) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self._options

        def read(thing: Thing) -> Iterator[tuple[str, dict[str, Any]]]:
            for first, frames in _records(thing, config):
                yield f"{thing.name}:{first}", {"file_name": thing.name, **frames}

        return records_of(
            self.info, things, read,
            folder=config.folder, max_corrupt=config.max_corrupt, kind="object",
        )  # fmt: skip

    def _generate_examples(self) -> None:
        raise TypeError("the splits are made in _split_generators")  # abstract in the base class


def builder(
    data_dir: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str],
    num_frames: int,
    hop: int | None = None,
    fps: float | None = None,
    short_side: int = 576,
    encoding: str = "jpeg",
    max_corrupt: int = 10,
) -> ViewFolder:
    """Make the builder for a folder of objects; it is prepared again whenever its content changes.

    Every object is a folder of its own, and holds a video file or a folder of frames for each view.
    They are views in the order of their names, 9 before 10; the first is the one that is given when
    a model draws. All show the same times in the same size. The file "cameras.json" in the folder
    of the object, or in one above it for all objects below, has the "elevations" and "azimuths" of
    the views in degrees, see cameras.cameras_in. Splits and what files are read are as in
    video_folder.builder.

    Args:
        data_dir: where TFDS data sets are prepared.
        folder: the user's folder.
        num_frames: times of a record; at least what a clip takes, and twice as many give clips
            enough beginnings. An object with fewer is left out like an unreadable one.
        hop: times from one record's beginning to the next one's; None for num_frames.
        fps: times per second that are taken of video files; None for all.
        short_side: larger frames are stored with that many pixels on their short side.
        encoding: how frames are stored, "jpeg" of quality 92 or lossless "png".
        max_corrupt: objects to leave out with a warning, before it is an error.

    Raises:
        OSError, FileNotFoundError, ValueError: as image_folder.builder; cameras that are missing,
            or another number of them than of views.
        ModuleNotFoundError: PyAV is not installed.
    """
    root = find_root(folder)
    config = ViewFolderConfig(
        name="",
        folder=str(root),
        content="",
        memory=str(memory_of(root, Path(data_dir) / "view_folder")),
        num_frames=num_frames,
        hop=num_frames if hop is None else hop,
        fps=fps,
        short_side=short_side,
        encoding=encoding,
        max_corrupt=max_corrupt,
    )
    check_frame_options(config)
    found = _scan(root)
    things = {split: _things(found, split, root) for split in found.splits}
    counts = ", ".join(f"{split} {len(own)}" for split, own in things.items())
    views = sorted({len(thing.views) for own in things.values() for thing in own})
    say_once(f"{root} holds objects: {counts}; views of each: {', '.join(map(str, views))}")
    content = _content(found, things, Path(config.memory), config)
    name = name_of(root, f"{max_corrupt} {content}")
    config = dataclasses.replace(config, name=name, content=content)
    return ViewFolder(data_dir=data_dir, config=config)


def _scan(root: Path) -> Scan:
    return scan(root, caption="none", kind=KIND)


def _things(found: Scan, split: str, root: Path) -> tuple[Thing, ...]:
    """Put the views of a split together to objects; ValueError for cameras that do not fit."""
    by_folder: dict[Path, list[Item]] = {}
    for item in found.splits[split]:
        by_folder.setdefault(item.path.parent, []).append(item)
    return tuple(_thing(folder, items, root) for folder, items in by_folder.items())


def _thing(folder: Path, items: list[Item], root: Path) -> Thing:
    file = find_cameras(folder, root)
    if file is None:
        raise FileNotFoundError(
            f"{folder} has no cameras.json, and neither has a folder above it; it should be like "
            '{"elevations": 10, "azimuths": [0, 90, 180, 270]}, in degrees, the given view first'
        )
    cameras = read_cameras(file)
    check_count(cameras, len(items), f"{folder} (cameras: {file})", "view")
    items = sorted(items, key=lambda item: natural(item.path.name))
    name = items[0].name.rpartition("/")[0] or root.name
    return Thing(folder, name, tuple(items), cameras)


def _content(
    found: Scan, things: dict[str, tuple[Thing, ...]], memory: Path, config: ViewFolderConfig
) -> str:
    """Hash the files of a folder, the cameras, and the options that decide about records."""
    options = [getattr(config, name) for name in _DECIDING]
    cameras = [(thing.name, *thing.cameras) for own in things.values() for thing in own]
    known = f"{options} {cameras} {fingerprint(found, memory)[1]}"
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _records(thing: Thing, config: ViewFolderConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Cut the views of an object into records: (number of the first time, fields)."""
    angles = thing.cameras._asdict()
    with contextlib.ExitStack() as stack:
        videos = [stack.enter_context(open_item(item, config)) for item in thing.views]
        views = [encoded(video, config) for video in videos]
        times = _together(thing.views, views)
        for first, rows in cut(times, videos[0].fps, config):
            frames = [frame for row in rows for frame in row]
            cameras = {n: np.tile(np.array(a, np.float32), len(rows)) for n, a in angles.items()}
            yield first, {"video": frames, VIEWS: len(views), "start": first, **cameras}


def _together(items: Sequence[Item], views: list[Iterator[bytes]]) -> Iterator[tuple[bytes, ...]]:
    """Read one frame of every view at a time; CorruptVideoError when they do not fit together."""
    number = 0
    while True:
        row = [next(view, None) for view in views]
        there = [
            item.path.name for item, frame in zip(items, row, strict=True) if frame is not None
        ]
        lost = [item.path.name for item, frame in zip(items, row, strict=True) if frame is None]
        if there and lost:
            raise CorruptVideoError(
                f"its views have different lengths: {lost[0]} ends after "
                f"{counted(number, 'frame', 'frames')}, and {there[0]} does not"
            )
        whole = tuple(frame for frame in row if frame is not None)
        if not whole:
            return
        if number == 0:
            _check_sizes(items, whole)
        yield whole
        number += 1


def _check_sizes(items: Sequence[Item], row: Sequence[bytes]) -> None:
    sizes = [transforms.size_of(frame) for frame in row]
    for item, size in zip(items, sizes, strict=True):
        if size != sizes[0]:
            raise CorruptVideoError(
                f"its views have different sizes: {item.path.name} has {size[1]} x {size[0]} "
                f"pixels, and {items[0].path.name} has {sizes[0][1]} x {sizes[0][0]}"
            )
