"""Batches of two sources: their rows interleaved, each source with a weight in the loss."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from diffusion_jax.data.batches import Batches


@final
class CaptionedFiles:
    """Records of image files that all have one caption."""

    def __init__(self, files: Sequence[Path], caption: str) -> None:
        """Take the files in this order; none is opened before it is read."""
        self.files, self.caption = tuple(files), caption

    def __len__(self) -> int:
        """Count the files."""
        return len(self.files)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Read one file, uint8 [h w 3]."""
        with Image.open(self.files[index]) as picture:
            return {"image": np.asarray(picture.convert("RGB")), "caption": self.caption}


def mixed(own: Batches, others: Batches, weight: float) -> Batches:
    """Join each batch of one source with the batch of the same step of another.

    Rows are interleaved in the shortest pattern, so that equal shares alternate; it is the same for
    any number of processes. "weight" is 1 for the first source and `weight` for the second. Columns
    that one of them lacks are left out, but for "loss_weight", which is 1 for the second source.
    Everything else is as in the first source.
    """

    def iterate(start_step: int = 0) -> Iterator[dict[str, Any]]:
        pairs = zip(own.iterate(start_step), others.iterate(start_step), strict=False)
        return (joined(first, second, weight) for first, second in pairs)

    return own._replace(iterate=iterate)


def joined(first: dict[str, Any], second: dict[str, Any], weight: float) -> dict[str, Any]:
    """Join two batches row by row, see mixed."""
    counts = len(first["index"]), len(second["index"])
    unit = math.gcd(*counts)
    starts = (0, counts[0])
    places = np.concatenate(
        [
            start + np.arange(count).reshape(unit, count // unit)
            for start, count in zip(starts, counts, strict=True)
        ],
        axis=1,
    ).reshape(-1)
    weights = np.where(places < counts[0], 1.0, weight).astype(np.float32)
    if "loss_weight" in first:  # which only the user's records have
        second = {**second, "loss_weight": np.ones(counts[1], np.float32)}
    batch = {
        name: np.concatenate([first[name], second[name]])[places]
        for name in first
        if name in second and name != "weight"
    }
    given = [
        np.asarray(side["weight"]) if "weight" in side else np.ones(count, np.float32)
        for side, count in zip((first, second), counts, strict=True)
    ]
    return {**batch, "weight": weights * np.concatenate(given)[places]}
