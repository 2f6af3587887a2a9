"""Images from bytes to uint8 arrays of one size: decode, pad, resize, crop."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

RESIZE_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
CROPS = ("center", "random", "stretch")
MODES = {1: "L", 3: "RGB"}

# What PIL raises on damaged files, by format: a broken PNG chunk is a SyntaxError, a short TIFF a
# struct.error.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# EXIF orientations that lay a picture on its side.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the caller knows which record it was and says so."""


class Fitted(NamedTuple):
    """An image after the deterministic part, and what size micro-conditioning needs to know.

    pixels: uint8 [h, w, c]. original_size: (height, width) as it is stored, but upright.
    resized_size: (height, width) that a window is cut, or was cut, out of.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]
    resized_size: tuple[int, int]


def decode(image: bytes | np.ndarray | Image.Image, channels: int) -> np.ndarray:
    """Decode one image to uint8 with the asked number of channels.

    Transparency is composited on white, 16-bit values are scaled to 8 bits, palettes are resolved,
    the EXIF orientation is applied, and of an animation the first frame counts.

    Args:
        image: encoded bytes of any format that PIL reads, a PIL image, or an array [h, w] or [h, w,
            1 | 2 | 3 | 4] of uint8 or uint16.
        channels: 1 (luma) or 3 (RGB).

    Returns:
        uint8 [h, w, channels].

    Raises:
        CorruptImageError: the bytes are not a complete image.
        ValueError: channels is neither 1 nor 3.
        TypeError: an array of another type or shape.
    """
    if channels not in MODES:
        raise ValueError(f"channels={channels} is not supported, choose 1 (grayscale) or 3 (RGB)")
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        image.load()
        pixels = np.asarray(_to_mode(ImageOps.exif_transpose(image), MODES[channels]))
    except _DECODE_ERRORS as error:
        raise CorruptImageError(f"not a readable image ({_why(error)})") from error
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels)


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """(height, width) that `decode` will return, from the header alone.

    Raises:
        CorruptImageError: the bytes have no readable header of an image.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    try:
        picture = Image.open(io.BytesIO(image))
        # Not picture.getexif(), which decodes a whole PNG to find an orientation at its end.
        orientation = Image.Image.getexif(picture).get(_ORIENTATION)
    except _DECODE_ERRORS as error:
        raise CorruptImageError(f"not a readable image ({_why(error)})") from error
    width, height = picture.size
    return (width, height) if orientation in _TURNED else (height, width)


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
        return "it begins as no known format does"
    return f"{type(error).__name__}: {error}"


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype == np.uint16:
        array = _to_8_bits(array)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (2, 3, 4))
    if array.dtype != np.uint8 or not fits or 0 in array.shape:
        raise TypeError(
            "an image array must be uint8 or uint16 of shape [h, w] or [h, w, 1..4], "
            f"got {array.dtype} of shape {list(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    """65535 -> 255 with rounding, so that full white stays full white (255 * 257 = 65535)."""
    return ((np.clip(array, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" and its byte orders, or "I" that holds 16-bit values
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.mode == "F":
        raise ValueError(
            "floating-point pixels have no fixed white, convert the file to 8 or 16 bits"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def fit(
    pixels: np.ndarray, *, image_size: tuple[int, int], crop: str, resize: str, pad: int
) -> Fitted:
    """Pad, then bring an image to a size: the deterministic part, which may be cached.

    Args:
        pixels: uint8 [h, w, c].
        image_size: (height, width) in pixels.
        crop: "center" resizes so that the image just covers image_size and cuts the middle;
            "random" leaves the cut to `cut`; "stretch" resizes both sides independently.
        resize: a name of RESIZE_FILTERS; all but "nearest" are antialiased when they shrink.
        pad: pixels to repeat beyond each edge before anything else (28 px + 2 x 2 = 32 px keeps
            strokes sharp).

    Returns:
        Fitted with pixels [height, width, c]; with crop="random" at least that large.
    """
    original_size = pixels.shape[:2]
    if pad:
        pixels = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    height, width = image_size
    old_height, old_width = pixels.shape[:2]
    if crop == "stretch":
        new_height, new_width = height, width
    else:
        scale = max(height / old_height, width / old_width)
        new_height = max(height, round(old_height * scale))
        new_width = max(width, round(old_width * scale))
    if (new_height, new_width) != (old_height, old_width):
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        picture = picture.resize((new_width, new_height), RESIZE_FILTERS[resize])
        pixels = np.asarray(picture).reshape(new_height, new_width, pixels.shape[-1])
    if crop == "center":
        pixels = cut(pixels, image_size, 0.5, 0.5)
    return Fitted(pixels, original_size, (new_height, new_width))


def corners(
    resized_sizes: np.ndarray, image_size: tuple[int, int], places: np.ndarray
) -> np.ndarray:
    """(top, left) of windows of image_size: int [b, 2].

    Args:
        resized_sizes: int [b, 2], (height, width) of what they are cut out of.
        places: float [b, 2] or [1, 2] in [0, 1), which of the possible offsets; 0.5 is the middle.
    """
    return (places * (resized_sizes - np.array([image_size]) + 1)).astype(np.int64)


def cut(pixels: np.ndarray, image_size: tuple[int, int], top: float, left: float) -> np.ndarray:
    """Cut a window out of [h, w, c]; top and left in [0, 1) choose among the possible offsets."""
    height, width = image_size
    ((y, x),) = corners(np.array([pixels.shape[:2]]), image_size, np.array([[top, left]]))
    return pixels[y : y + height, x : x + width]


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 in [-1, 1]: x / 127.5 - 1."""
    scaled = images.astype(np.float32)
    scaled /= 127.5  # in place: two temporaries of a large batch cost more than the arithmetic
    scaled -= 1
    return scaled


def check_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an option that is one number for squares, or such a pair.

    Raises:
        ValueError: neither, or not positive.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(
            f"image_size={image_size!r} must be a positive number of pixels "
            "or a pair (height, width)"
        )
    return size


def make_fit(
    *, channels: int, crop: str, resize: str, pad: int
) -> Callable[[bytes | np.ndarray, tuple[int, int]], Fitted]:
    """Check the options once and bind them: (encoded image, (height, width)) -> Fitted.

    Args:
        channels: 1 (grayscale) or 3 (RGB).
        crop: "center", "random" or "stretch".
        resize: a name of RESIZE_FILTERS; all but "nearest" are antialiased when they shrink.
        pad: pixels to add on each side by repeating the edge, before resizing.

    Raises:
        ValueError: an option outside its choices, naming the argument, the value and the choices.
    """
    if channels not in MODES:
        raise ValueError(f"channels={channels!r} is not supported, choose 1 (grayscale) or 3 (RGB)")
    if crop not in CROPS:
        raise ValueError(f"crop={crop!r} is unknown, choose one of {', '.join(CROPS)}")
    if resize not in RESIZE_FILTERS:
        raise ValueError(f"resize={resize!r} is unknown, choose one of {', '.join(RESIZE_FILTERS)}")
    if pad < 0:
        raise ValueError(f"pad={pad} must be 0 or a positive number of pixels")

    def fit_encoded(image: bytes | np.ndarray, image_size: tuple[int, int]) -> Fitted:
        pixels = decode(image, channels)
        return fit(pixels, image_size=image_size, crop=crop, resize=resize, pad=pad)

    return fit_encoded
