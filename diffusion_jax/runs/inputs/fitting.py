"""Pictures of any size and proportions -> the size that is drawn."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from diffusion_jax.data.transforms import RESIZE_FILTERS, fit

# How a picture of other proportions becomes one of a size, in the names of common interfaces.
Resize: TypeAlias = Literal["resize", "crop", "pad"]
RESIZES: tuple[Resize, ...] = ("resize", "crop", "pad")


def fit_pixels(rows: np.ndarray, size: tuple[int, int], resize: Resize) -> np.ndarray:
    """Fit pictures, uint8 [b h w c], into a size -> uint8 [b *size c].

    resize: "resize" changes both sides independently. "crop" cuts the largest window of the wanted
    proportions out of the middle. "pad" makes the whole picture fit and repeats its edge.
    """
    return _fitted(rows, size, resize, _stretched, {"mode": "edge"})


def fit_masks(masks: np.ndarray, size: tuple[int, int], resize: Resize) -> np.ndarray:
    """Fit masks, float32 [b h w 1] in [0, 1], as their pictures; what "pad" adds is 0."""
    return _fitted(masks, size, resize, _averaged, {"mode": "constant"})


def extend(rows: np.ndarray, multiple: int) -> np.ndarray:
    """Repeat the last row and column of [b h w c] until both sides are multiples of a number."""
    more = [(0, -side % multiple) for side in rows.shape[1:3]]
    return np.pad(rows, ((0, 0), *more, (0, 0)), mode="edge") if np.any(more) else rows


def _fitted(
    rows: np.ndarray,
    size: tuple[int, int],
    resize: Resize,
    stretch: Callable[[np.ndarray, tuple[int, int]], np.ndarray],
    padding: dict,
) -> np.ndarray:
    old = rows.shape[1:3]
    ratios = [new / side for new, side in zip(size, old, strict=True)]
    if resize == "crop":
        window = [min(s, max(1, round(n / max(ratios)))) for s, n in zip(old, size, strict=True)]
        top, left = ((s - w) // 2 for s, w in zip(old, window, strict=True))
        rows = rows[:, top : top + window[0], left : left + window[1]]
    inner = size
    if resize == "pad":
        height, width = (max(1, round(s * min(ratios))) for s in old)
        inner = (height, width)
    made = np.stack([stretch(row, inner) for row in rows])
    around = [((n - i) // 2, n - i - (n - i) // 2) for n, i in zip(size, inner, strict=True)]
    return np.pad(made, ((0, 0), *around, (0, 0)), **padding)


def _stretched(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return fit(pixels, image_size=size, crop="stretch", resize="bicubic", pad=0).pixels


def _averaged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(mask[..., 0]).resize((size[1], size[0]), RESIZE_FILTERS["area"])
    return np.clip(np.asarray(picture), 0.0, 1.0)[..., None]
