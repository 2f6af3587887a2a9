"""What the builders of videos share: how frames are read and stored, and cut into records."""

import collections
import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data import transforms
from diffusion_jax.data.progress import log_progress
from diffusion_jax.data.sources.cameras import check_count
from diffusion_jax.data.sources.folder_content import Named, skip
from diffusion_jax.data.sources.folder_scan import Item
from diffusion_jax.data.sources.video_files import CorruptVideoError, Video, count_said, open_video
from diffusion_jax.wording import counted

T = TypeVar("T")
N = TypeVar("N", bound=Named)
ENCODINGS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "jpeg", "quality": 92, "subsampling": "4:2:0"},
    "png": {"format": "png"},
}
# Of an orbit whose folder of frames says no rate: its time means nothing.
_ORBIT_FPS = 1.0


@runtime_checkable
class FrameOptions(Protocol):
    """What a builder's configuration says of the frames of its records."""

    num_frames: int
    hop: int
    fps: float | None
    short_side: int
    encoding: str


def check_frame_options(options: FrameOptions) -> None:
    """Raise ValueError for options outside their choices."""
    for name in ("num_frames", "hop", "short_side"):
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"{name} = {value} should be at least 1")
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise ValueError(f"fps = {options.fps} should be above 0")
    if options.encoding not in ENCODINGS:
        raise ValueError(
            f"encoding = {options.encoding!r} is unknown; choose from {', '.join(ENCODINGS)}"
        )


def cut(frames: Iterator[T], fps: float, options: FrameOptions) -> Iterator[tuple[int, list[T]]]:
    """Cut the frames of a video into records: (number of the first frame, frames).

    Raises:
        CorruptVideoError: there are fewer frames than a record takes.
    """
    length, hop, count, shown = options.num_frames, options.hop, 0, 0
    kept: collections.deque[T] = collections.deque(maxlen=length)
    for frame in frames:
        kept.append(frame)
        count += 1
        if count >= length and (count - length) % hop == 0:
            yield count - length, list(kept)
            shown = count
    if count < length:
        raise CorruptVideoError(
            f"it has {count} frames at {fps:.4g} per second, and a record takes "
            f"num_frames = {length}"
        )
    if 2 * (count - shown) >= hop:
        yield count - length, list(kept)


def records_of(
    info: tfds.core.DatasetInfo,
    items: Sequence[N],
    read: Callable[[N], Iterator[T]],
    *,
    folder: str,
    max_corrupt: int,
    kind: str,
) -> Iterator[T]:
    """Read the records of all items of a folder; what cannot be read is left out, see skip.

    read: item -> its records. kind: what an item is, for messages.

    Raises:
        ValueError: no item can be used, or more than max_corrupt cannot.
    """
    count, last = 0, ""
    for item in log_progress(items, len(items), f"preparing {folder}"):
        try:
            for record in read(item):
                yield record
                count += 1
        except (OSError, CorruptVideoError, transforms.CorruptImageError) as error:
            skip(info, item, error, max_corrupt, kind)
            last = f"; the last one, {item.name}: {error}"
    if not count:
        held = counted(len(items), kind, f"{kind}s")
        raise ValueError(f"{folder} holds {held}, and none can be used{last}")


@contextlib.contextmanager
def open_item(item: Item, options: FrameOptions) -> Iterator[Video]:
    """Open a video file or a folder of frames, to read its frames one after the other.

    Raises:
        CorruptVideoError, OSError, ModuleNotFoundError: as open_video.
        transforms.CorruptImageError: while iterating, a file that is no image.
    """
    if item.path.is_dir():
        yield Video(options.fps or _ORBIT_FPS, map(open_image, item.files()))
        return
    with open_video(item.path, fps=options.fps, short_side=options.short_side) as video:
        yield video


def encoded(video: Video, options: FrameOptions) -> Iterator[bytes]:
    """Encode the frames of a video; CorruptVideoError when they have several sizes."""
    size = None
    for number, frame in enumerate(video.frames):
        size = size or frame.size
        if frame.size != size:
            raise CorruptVideoError(f"frame {number} has the size {frame.size}, the first {size}")
        yield encode(frame, options)


def check_cameras(items: list[Item], options: FrameOptions) -> None:
    """Raise ValueError for the first video that has another number of cameras than of frames.

    The number in the header of a file is believed where it fits; otherwise frames are counted. What
    cannot be read is left for later.
    """
    for item in items:
        if item.cameras is None:
            continue
        try:
            fits = not item.path.is_dir() and options.fps is None
            if fits and count_said(item.path) == len(item.cameras.azimuths):
                continue
            count = len(item.files())
            if not item.path.is_dir():
                with open_item(item, options) as video:
                    count = sum(1 for _ in video.frames)
        except (OSError, CorruptVideoError):
            continue
        rate = "" if options.fps is None or item.path.is_dir() else f" at fps = {options.fps:g}"
        check_count(item.cameras, count, f"{item.path}{rate}")


def open_image(path: Path) -> Image.Image:
    """Read an image file."""
    return Image.fromarray(transforms.decode(path.read_bytes(), 3))


def encode(frame: Image.Image, options: FrameOptions) -> bytes:
    """Encode a frame, made smaller where its short side is longer than options.short_side."""
    factor = min(1.0, options.short_side / min(frame.size))
    if factor < 1:
        size = (max(1, round(frame.width * factor)), max(1, round(frame.height * factor)))
        frame = frame.resize(size, Image.Resampling.BICUBIC)
    return _saved(frame, **ENCODINGS[options.encoding])


def png(pixels: np.ndarray) -> bytes:
    """Encode the pixels of a frame, uint8 [h w 3], quickly and without loss."""
    return _saved(Image.fromarray(pixels), format="png", compress_level=1)


def _saved(frame: Image.Image, **options: Any) -> bytes:
    saved = io.BytesIO()
    frame.save(saved, **options)
    return saved.getvalue()
