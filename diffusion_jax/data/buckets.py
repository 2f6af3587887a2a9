"""Buckets of one aspect ratio each: their shapes, and which image belongs where.

SDXL (Podell et al. 2023, section 2.3) and NovelAI train on batches of images of nearly the same
proportions, so that little is cropped.
"""

import logging
import math
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data import transforms
from diffusion_jax.data.clips import frames_of
from diffusion_jax.data.progress import for_each
from diffusion_jax.data.records import Records

_log = logging.getLogger(__name__)


class BucketRule(NamedTuple):
    """The options of bucket_shapes, and the padding that transforms.fit adds before it resizes."""

    divisor: int
    max_aspect: float
    pad: int


def bucket_shapes(
    image_size: tuple[int, int], *, divisor: int = 64, max_aspect: float = 2.0
) -> tuple[tuple[int, int], ...]:
    """List shapes of about the area a of image_size: pairs (s, floor(a / s)) of short sides s.

    Sides are multiples of the divisor, and each pair stands upright and on its side. For 1024 px
    and a divisor of 64 these are shapes of SDXL's table (appendix I), which lists smaller areas as
    well; fewer shapes mean fewer programs to compile. Source: NovelAI, aspect ratio bucketing.

    Args:
        image_size: (height, width), multiples of the divisor; always one of the shapes.
        divisor: a number that the network needs, such as 8 (autoencoder) times 8 (three halvings).
        max_aspect: the most that the longer side divided by the shorter may be.

    Returns:
        (height, width) pairs, the widest first.

    Raises:
        ValueError: image_size is no multiple of the divisor, or an option is out of range.
    """
    if divisor < 1:
        raise ValueError(f"bucket_divisor = {divisor} should be at least 1")
    if not 1 <= max_aspect < math.inf:
        raise ValueError(f"max_aspect = {max_aspect} should be at least 1, which is square")
    if any(side % divisor for side in image_size):
        raise ValueError(
            f"image_size = {image_size} should be a multiple of bucket_divisor = {divisor}, "
            "so that it is one of the shapes"
        )
    area = image_size[0] * image_size[1]
    shapes = {image_size}
    for short in range(divisor, math.isqrt(area) + 1, divisor):
        long = area // short // divisor * divisor
        if long <= short * max_aspect:
            shapes |= {(short, long), (long, short)}
    return tuple(sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape)))


def fill_buckets(
    sizes: np.ndarray,
    shapes: tuple[tuple[int, int], ...],
    *,
    at_least: int = 1,
    repeats: np.ndarray | None = None,
) -> tuple[tuple[tuple[int, int], ...], tuple[np.ndarray, ...]]:
    """Put every image into the bucket of the nearest log(height / width).

    Shapes without images are left out. Then the shape with the fewest images, while they are
    fewer than at_least, is left out too and its images go to their next nearest.

    Args:
        sizes: int [n, 2], (height, width) of the images, n >= 1.
        shapes: as bucket_shapes returns them, the widest first.
        at_least: how many images a shape needs.
        repeats: as how many each image counts for that, int [n]; None for 1.

    Returns:
        The shapes that are left, and the numbers of the images of each, int64 [n_i].
    """
    ratios = np.log(sizes[:, 0] / sizes[:, 1])
    while True:
        centers = np.log([height / width for height, width in shapes])
        nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, ratios)
        counts = np.bincount(nearest, repeats, minlength=len(shapes))
        fewest = int(np.argmin(counts))
        if counts[fewest] >= max(at_least, 1) or len(shapes) == 1:
            members = tuple(np.flatnonzero(nearest == i) for i in range(len(shapes)))
            return shapes, members
        shapes = shapes[:fewest] + shapes[fewest + 1 :]


def image_sizes(source: Records, image_key: str) -> np.ndarray:
    """Read (height, width) of every image from its header, turned upright: int32 [n, 2].

    Nothing is decoded; of a video the first frame counts. An image whose header is damaged gets
    (0, 0). The log says how far it is and how long it took.
    """
    sizes = np.zeros((len(source), 2), np.int32)

    def read(index: int) -> None:
        sizes[index] = _size_or_zero(frames_of(source[index][image_key]))

    seconds = for_each(len(source), read, "reading the sizes of images")
    _log.info("read the sizes of %d images in %.1f s", len(source), seconds)
    return sizes


def sort_into_buckets(
    source: Records,
    image_key: str,
    image_size: tuple[int, int],
    rule: BucketRule | None,
    *,
    at_least: int = 1,
    repeats: np.ndarray | None = None,
) -> tuple[tuple[tuple[int, int], ...], tuple[np.ndarray, ...]]:
    """Find the shapes that a source needs, and the record numbers of each, int64 [n_i].

    Without a rule all records have the shape image_size. Else see bucket_shapes and fill_buckets,
    also for the errors; a record without a readable header counts as one of image_size.
    """
    if rule is None:
        return (image_size,), (np.arange(len(source)),)
    shapes = bucket_shapes(image_size, divisor=rule.divisor, max_aspect=rule.max_aspect)
    sizes = image_sizes(source, image_key)
    sizes = np.where(sizes == 0, np.array([image_size], np.int32), sizes + 2 * rule.pad)
    shapes, members = fill_buckets(sizes, shapes, at_least=at_least, repeats=repeats)
    _log.info(
        "buckets (height x width: images): %s",
        ", ".join(f"{h}x{w}: {len(m)}" for (h, w), m in zip(shapes, members, strict=True)),
    )
    return shapes, members


def _size_or_zero(frames: list[Any]) -> tuple[int, int]:
    try:
        return transforms.size_of(frames[0])
    except transforms.CorruptImageError:
        return 0, 0
