"""Captions that are lists of tags: shuffled, and some left out, in training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.order import TAG, uniform


class TagRule(NamedTuple):
    """What training does to the tags of a caption.

    separator: what lies between them, spaces around it aside, and joins them again. keep: how many
    of the first stay as they are. shuffle: bring the others into a random order. drop: with this
    probability each of the others is left out.
    """

    separator: str
    keep: int
    shuffle: bool
    drop: float


def with_tags(
    make: Callable[[int], dict[str, Any]],
    rule: TagRule | None,
    rows: np.ndarray,
    seed: int,
    step: int,
) -> dict[str, Any]:
    """Make batch `step` and change its captions; how is a function of (seed, step, row) alone.

    make: step -> this process's rows of a global batch. rule: None changes nothing. rows: which
    rows of the global batch these are.
    """
    batch = make(step)
    if rule is None or "caption" not in batch:
        return batch
    captions = [
        changed(rule, str(caption), seed, step, int(row))
        for caption, row in zip(batch["caption"], rows, strict=True)
    ]
    return {**batch, "caption": np.array(captions)}


def changed(rule: TagRule, caption: str, seed: int, step: int, row: int) -> str:
    """Shuffle and drop the tags of the caption in one row of a global batch."""
    parts = [part.strip() for part in caption.split(rule.separator.strip() or rule.separator)]
    tags = [part for part in parts if part]
    first, rest = tags[: rule.keep], tags[rule.keep :]
    chances, places = uniform(seed, TAG, step, (2, len(rest)), part=row)
    order = np.argsort(places, kind="stable") if rule.shuffle else np.arange(len(rest))
    kept = [rest[number] for number in order if chances[number] >= rule.drop]
    return rule.separator.join([*first, *kept])
