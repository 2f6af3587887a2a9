"""Clips of several views: the given view apart from the ones that a model learns to draw."""

from collections.abc import Callable
from typing import Any

import numpy as np

# The given view at each time, float32 [b t h w c].
GIVEN_VIEW = "given_view"


def with_views(
    make: Callable[[int], dict[str, Any]], num_views: int | None, step: int
) -> dict[str, Any]:
    """Make batch `step` and take the first view of each time out of its images.

    make: step -> a batch whose images [b n h w c] show the given view at the first time, then the
    num_views others, then the same at the next time. The batch then has the others as "image" and
    the given one as GIVEN_VIEW. num_views: None changes nothing.
    """
    batch = make(step)
    if num_views is None:
        return batch
    images = batch["image"]
    by_time = images.reshape(len(images), -1, 1 + num_views, *images.shape[2:])
    others = by_time[:, :, 1:].reshape(len(images), -1, *images.shape[2:])
    given = {GIVEN_VIEW: np.ascontiguousarray(by_time[:, :, 0])}
    kept = {name: rows for name, rows in batch.items() if name != "image_only_indicator"}
    return {**kept, "image": others, **given}
