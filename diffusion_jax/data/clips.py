"""Clips of video: which frames of a record are shown, their frame rate and their motion."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.motion import motion_bucket, motion_speed
from diffusion_jax.data.transforms import CorruptImageError, Fitted


class ClipRule(NamedTuple):
    """How a clip is taken from the frames of a record: num_frames of them, each stride-th one.

    num_views: None for records of one view. Else a record holds every view of its first time, then
    every view of the next one; num_frames counts so many views of each time, and the record's first
    view comes besides, before them.
    """

    num_frames: int
    stride: int
    num_views: int | None = None

    @property
    def times(self) -> int:
        """Count the times that a clip shows."""
        return self.num_frames // (self.num_views or 1)

    @property
    def span(self) -> int:
        """Count the times from the first of a clip to its last."""
        return (self.times - 1) * self.stride + 1

    @property
    def shown(self) -> int:
        """Count the frames of a record that a clip shows."""
        return self.num_frames if self.num_views is None else self.num_frames + self.times


class Clip(NamedTuple):
    """What a batch says of a clip besides its frames.

    num_frames: how many are shown. still: it is one image, which every frame repeats. fps: frames
    per second of the clip, 0 for a still; None when the source does not say it, and then
    motion_bucket means nothing.
    """

    num_frames: int
    still: bool
    fps: float | None
    motion_bucket: int


def check_rule(num_frames: int, frame_stride: int, num_views: int | None = None) -> ClipRule:
    """Make a ClipRule of options.

    Raises:
        ValueError: one of them is less than 1, or the views do not divide the frames.
    """
    for name, value in (("num_frames", num_frames), ("frame_stride", frame_stride)):
        if value < 1:
            raise ValueError(f"{name} = {value} should be at least 1")
    if num_frames % (num_views or 1):
        raise ValueError(
            f"num_frames = {num_frames} should be a multiple of {num_views}, the views of each time"
        )
    return ClipRule(num_frames, frame_stride, num_views)


def window(count: int, rule: ClipRule, place: float, views: int = 1) -> list[int]:
    """Choose the frames of a clip among the `count` frames of a record.

    place: which of the possible beginnings, in [0, 1); 0.5 is the middle. A record of one frame is
    a still, which is repeated. views: how many the record has of each time. Where these are more
    than a clip shows, the place also tells which ones are left out; the first always stays.

    Raises:
        CorruptImageError: a record that is too short, or has too few views.
    """
    if count == 1 and rule.num_views is None:
        return [0] * rule.num_frames
    times = count // views
    if times < rule.span:
        raise CorruptImageError(
            f"too short: it has {times} frames, and num_frames = {rule.num_frames} with "
            f"frame_stride = {rule.stride} takes {rule.span}"
        )
    beginning = place * (times - rule.span + 1)
    start = int(beginning)
    shown = range(start, start + rule.span, rule.stride)
    if rule.num_views is None:
        return list(shown)
    chosen = choose_views(views, rule.num_views, beginning - start)
    return [time * views + view for time in shown for view in chosen]


def choose_views(views: int, wanted: int, place: float) -> list[int]:
    """Choose view 0 and `wanted` of the views 1, 2, ..., views - 1, in their order.

    place: which of the possible choices, in [0, 1).

    Raises:
        CorruptImageError: there are too few.
    """
    if views <= wanted:
        raise CorruptImageError(f"it has {views} views, and a clip takes {wanted + 1}")
    chosen, rank = [0], int(place * math.comb(views - 1, wanted))
    for view in range(1, views):
        left = wanted + 1 - len(chosen)
        with_it = math.comb(views - 1 - view, left - 1) if left else 0
        if rank < with_it:
            chosen.append(view)
        else:
            rank -= with_it
    return chosen


def is_single(value: Any) -> bool:
    """Tell whether a field of a record is one image and not a sequence of them."""
    return isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.ndim < 4)


def frames_of(value: Any) -> list[Any]:
    """List the frames of a field of a record; a single image is one frame."""
    return [value] if is_single(value) else list(value)


def frame_rate(value: Any, given: Any) -> float | None:
    """Find the frames per second of a field of a record: what its source said, if anything.

    An image has none, which counts as 0; of a sequence without a rate nothing is known: None.
    """
    if given is None:
        return 0.0 if is_single(value) else None
    return float(given)


def fit_clip(
    fit_frame: Callable[[int], Fitted],
    count: int,
    fps: float | None,
    rule: ClipRule,
    place: float,
    views: int = 1,
) -> tuple[Fitted, Clip, list[int]]:
    """Decode and fit a clip of a record.

    Returns Fitted with pixels [t h w c], what a batch says of it, and which frames it shows.

    Args:
        fit_frame: frame number -> the frame, decoded and fitted.
        count: how many frames the record has.
        fps: frames per second of the record, None when its source does not say it.
        rule: which frames make a clip.
        place: which of the clips, in [0, 1): see window.
        views: how many the record has of each time.

    Raises:
        CorruptImageError: a record that is too short, or has too few views, a frame that cannot be
            decoded, or frames of different sizes.
    """
    chosen = window(count, rule, place, views)
    fitted = {number: fit_frame(number) for number in sorted(set(chosen))}
    first = fitted[chosen[0]]
    for number, frame in fitted.items():
        if (frame.original_size, frame.pixels.shape) != (first.original_size, first.pixels.shape):
            raise CorruptImageError(
                f"not a clip: frame {number} has the size {frame.original_size}, another one "
                f"{first.original_size}"
            )
    pixels = np.stack([fitted[number].pixels for number in chosen])
    return first._replace(pixels=pixels), _describe(pixels, count == 1, fps, rule), chosen


def unreadable(rule: ClipRule, fps: float | None) -> Clip:
    """Describe the black frames that stand for an unreadable clip in evaluation."""
    return Clip(rule.shown, True, fps and 0.0, 0)


def _describe(pixels: np.ndarray, still: bool, fps: float | None, rule: ClipRule) -> Clip:
    if still or not fps:
        return Clip(rule.shown, still, fps and 0.0, 0)
    shown = fps / rule.stride
    return Clip(rule.shown, False, shown, motion_bucket(motion_speed(pixels, shown)))


def clip_columns(clips: Sequence[Clip]) -> dict[str, np.ndarray]:
    """Make the columns of a batch that describe its clips: see batches.Batches."""
    still = np.array([[clip.still] * clip.num_frames for clip in clips])
    columns = {"image_only_indicator": still.astype(np.float32)}
    if all(clip.fps is not None for clip in clips):
        numbers: Any = [(max(clip.fps or 0.0, 1.0) - 1, clip.motion_bucket) for clip in clips]
        fps_id, bucket = np.array(numbers, np.float32).T
        columns |= {"fps_id": fps_id[:, None], "motion_bucket_id": bucket[:, None]}
    return columns
