"""Pictures for people: pixels of arrays in [-1, 1], grids of images, captions as tiles."""

import io
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from diffusion_jax.data.whole_files import whole_file


def to_pixels(images: np.ndarray, *, clamp: bool = True) -> np.ndarray:
    """Turn values in [-1, 1] into uint8 pixels of the same shape; uint8 passes unchanged.

    Values outside are clipped; with clamp=False the whole array is scaled down until it fits
    instead, which keeps the contrast of latents. NaN becomes black.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    images = np.nan_to_num(images.astype(np.float32), nan=-1.0, posinf=1.0, neginf=-1.0)
    if not clamp and images.size:
        images = images / np.float32(max(1.0, float(np.abs(images).max())))
    return np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def image_grid(images: np.ndarray, *, columns: int = 4, padding: int = 2) -> np.ndarray:
    """Lay out images [n h w c] row by row in a grid [H W c] with black lines between them.

    An array [rows columns h w c] keeps its own rows. One single image comes back without a frame.
    Raises ValueError for other ranks, for no image, and unless c is 1 or 3.
    """
    if images.ndim == 5:
        columns = images.shape[1]
        images = images.reshape(-1, *images.shape[2:])
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images of shape {images.shape} should be [n, h, w, c] or [rows, columns, h, w, c] "
            "with at least one image and 1 or 3 channels"
        )
    n, h, w, c = images.shape
    if n == 1:
        return images[0]
    columns = min(columns, n)
    rows = -(-n // columns)
    cell_h, cell_w = h + padding, w + padding
    grid = np.zeros((rows * cell_h + padding, columns * cell_w + padding, c), images.dtype)
    for i, image in enumerate(images):
        top, left = padding + i // columns * cell_h, padding + i % columns * cell_w
        grid[top : top + h, left : left + w] = image
    return grid


def save_png(
    path: pathlib.Path, image: np.ndarray, texts: Mapping[str, str] = MappingProxyType({})
) -> pathlib.Path:
    """Write one uint8 image [h w c], c 1 or 3, as a whole or not at all, and return its path.

    texts: see png_bytes.
    """
    encoded = png_bytes(image, texts)
    with whole_file(path) as partial:
        partial.write_bytes(encoded)
    return path


def png_bytes(image: np.ndarray, texts: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Encode one uint8 image [h w c], c 1 or 3; texts: go into text chunks of these names."""
    encoded, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(encoded, "png", pnginfo=chunks)
    return encoded.getvalue()


def caption_tiles(captions: Sequence[str], *, size: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Draw each caption in black on a white tile -> uint8 [n h w 3]; size is (h, w) in pixels."""
    h, w = size
    tiles = np.full((len(captions), h, w, 3), 255, np.uint8)
    characters = max(1, w // 6)  # Pillow's built-in font is about 6 pixels wide
    for i, caption in enumerate(captions):
        tile = Image.fromarray(tiles[i])
        text = "\n".join(textwrap.wrap(str(caption), characters))
        ImageDraw.Draw(tile).multiline_text((2, 2), text, fill=(0, 0, 0), spacing=1)
        tiles[i] = np.asarray(tile)
    return tiles
