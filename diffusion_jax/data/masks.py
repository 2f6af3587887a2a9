"""Random masks for the training of inpainting models."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffusion_jax.data.order import MASK, uniform

# How many numbers in [0, 1) a mask is made of: its kind, and what the kind takes.
DRAWS = 40
_MOST_BOXES, _MOST_TURNS = 4, 10


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise ValueError for a kind of mask that KINDS does not have."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"masks = {kind!r} is unknown; choose from {', '.join(KINDS)}")


def with_masks(
    make: Callable[[int], dict[str, Any]],
    kinds: Sequence[str],
    loss_mask: str | None,
    rows: np.ndarray,
    batch_size: int,
    seed: int,
    step: int,
) -> dict[str, Any]:
    """Make batch `step` and add its masks; random ones are a function of (seed, step, row) alone.

    make: step -> this process's rows of a global batch. kinds: see draw_masks; () adds none.
    loss_mask: the column with pictures that are white where pixels count, or None. rows: which rows
    of the batch_size these are.
    """
    batch = make(step)
    if loss_mask is not None:
        white = (batch[loss_mask].mean(-1, keepdims=True) + 1.0) / 2.0
        batch = {**batch, "loss_mask": white.astype(np.float32)}
    if not kinds:
        return batch
    draws = uniform(seed, MASK, step, (batch_size, DRAWS))[rows]
    mask = draw_masks(kinds, batch["image"].shape[1:3], draws)
    return {**batch, "mask": mask, "masked_image": mask * batch["image"]}


def draw_masks(kinds: Sequence[str], size: tuple[int, int], draws: np.ndarray) -> np.ndarray:
    """Make a mask for each sample -> float32 [b h w 1], 1 where its image is kept and else 0.

    kinds: rows of KINDS; each sample takes one of them, each as often. draws: float [b DRAWS] in
    [0, 1), which determine the mask of a sample.
    """
    height, width = size
    masks = []
    for row in draws:
        hole = Image.new("L", (width, height))
        kind = kinds[int(row[0] * len(kinds))]
        KINDS[kind](ImageDraw.Draw(hole), np.array([width, height]), row[1:])
        masks.append(np.asarray(hole) == 0)
    return np.stack(masks)[..., None].astype(np.float32)


def _boxes(canvas: ImageDraw.ImageDraw, sides: np.ndarray, draws: np.ndarray) -> None:
    """Draw up to 4 boxes, each side from 0.1 to 0.6 of the image's."""
    for place, share in draws[1 : 1 + 4 * _MOST_BOXES].reshape(-1, 2, 2)[
        : _some(draws, _MOST_BOXES)
    ]:
        box = np.maximum(1, np.round((0.1 + 0.5 * share) * sides))
        corner = np.round(place * (sides - box))
        canvas.rectangle([*corner, *(corner + box - 1)], fill=1)


def _strokes(canvas: ImageDraw.ImageDraw, sides: np.ndarray, draws: np.ndarray) -> None:
    """Draw a line with up to 10 turns, 0.05 to 0.3 of the shorter side thick."""
    thick = max(1.0, (0.05 + 0.25 * draws[1]) * sides.min())
    points = [draws[2:4] * sides]
    for turn, length in draws[4 : 4 + 2 * _MOST_TURNS].reshape(-1, 2)[: _some(draws, _MOST_TURNS)]:
        step = (0.1 + 0.3 * length) * sides.max()
        way = np.array([np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)])
        points.append(np.clip(points[-1] + step * way, 0, sides - 1))
    canvas.line([tuple(point) for point in points], fill=1, width=round(thick))
    for x, y in points:
        canvas.ellipse([x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], fill=1)


def _everything(canvas: ImageDraw.ImageDraw, sides: np.ndarray, draws: np.ndarray) -> None:
    """Keep nothing of the image, so that the model also draws from the text alone."""
    del draws
    canvas.rectangle([0, 0, *sides], fill=1)


def _some(draws: np.ndarray, most: int) -> int:
    return 1 + int(draws[0] * most)


KINDS: dict[str, Callable[[ImageDraw.ImageDraw, np.ndarray, np.ndarray], None]] = {
    "boxes": _boxes,
    "strokes": _strokes,
    "everything": _everything,
}
