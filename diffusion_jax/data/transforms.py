"""Images from bytes to uint8 arrays of one size: decode, pad, resize, crop."""

import io
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

RESIZE_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
CROPS = ("center", "random", "stretch")
MODES = {1: "L", 3: "RGB"}

# EXIF orientation -> how to turn a stored picture upright.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What PIL raises for EXIF data that make no sense, in pictures that are whole all the same.
_EXIF_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
# A picture that would be resized to more than this many windows is cut first and resized later.
_MOST_WINDOWS = 16


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the caller knows which record it was and says so."""


class Fitted(NamedTuple):
    """An image after the deterministic part, and what size micro-conditioning needs to know.

    pixels: uint8 [h, w, c]; for crop="random" resized to resized_size unless that would be very
    large, see cut. original_size: (height, width) as it is stored, but upright. resized_size:
    (height, width) that a window is cut, or was cut, out of.
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
    _check_channels(channels)
    picture = upright(image)
    try:
        pixels = np.asarray(_to_mode(picture, MODES[channels]))
    except Exception as error:  # as in upright
        raise CorruptImageError(f"not a readable image ({_why(error)})") from error
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels)


def upright(image: bytes | np.ndarray | Image.Image) -> Image.Image:
    """Read a picture as decode does, but with its own channels and the opacity that it may have.

    Raises CorruptImageError and TypeError as decode does.
    """
    picture = open_picture(_from_array(image) if isinstance(image, np.ndarray) else image)
    try:
        orientation = _orientation(picture)
        if orientation in _TURNS:
            picture = picture.transpose(_TURNS[orientation])
            # Whoever reads the result must not turn it again.
            picture.info = {k: v for k, v in picture.info.items() if k == "transparency"}
        return _with_8_bits(picture)
    except Exception as error:  # PIL raises whatever its decoders meet in a damaged file
        raise CorruptImageError(f"not a readable image ({_why(error)})") from error


def decode_alpha(image: bytes | np.ndarray | Image.Image) -> np.ndarray:
    """Decode how opaque an image is, upright: uint8 [h, w, 1], 255 where it says nothing of it.

    Raises CorruptImageError and TypeError as decode does.
    """
    picture = upright(image)
    try:
        if not picture.has_transparency_data:
            return np.full((picture.height, picture.width, 1), 255, np.uint8)
        return np.asarray(picture.convert("RGBA").getchannel("A"))[..., None]
    except Exception as error:  # as in upright
        raise CorruptImageError(f"not a readable image ({_why(error)})") from error


def open_picture(image: bytes | Image.Image) -> Image.Image:
    """Read all pixels of a picture, as it is stored; CorruptImageError if that is not possible."""
    try:
        picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        picture.load()
    except Exception as error:  # as in upright
        raise CorruptImageError(f"not a readable image ({_why(error)})") from error
    return picture


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """Find the (height, width) that `decode` will return, from the header alone.

    Raises:
        CorruptImageError: the bytes have no readable header of an image.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    try:
        picture = Image.open(io.BytesIO(image))
        width, height = picture.size
        if isinstance(picture, TiffImageFile):  # PIL has swapped the sides already, but not always
            width, height = picture.tag_v2[IMAGEWIDTH], picture.tag_v2[IMAGELENGTH]
        lies = _orientation(picture) in (5, 6, 7, 8)
    except Exception as error:  # as in upright
        raise CorruptImageError(f"not a readable image ({_why(error)})") from error
    return (width, height) if lies else (height, width)


def _orientation(picture: Image.Image) -> Any:
    """Read the EXIF or XMP orientation of a picture; 1 when it has none that can be read."""
    try:
        if "exif" in picture.info:  # PIL stops reading at the first tag that makes no sense
            found = _tiff_orientation(picture.info["exif"].removeprefix(b"Exif\0\0"))
            if found is not None:
                return found
        # Not picture.getexif(), which decodes a whole PNG to find an orientation at its end.
        return Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except _EXIF_ERRORS:
        return 1


def _tiff_orientation(data: bytes) -> int | None:
    """Find the orientation in the first directory of EXIF data. Source: TIFF 6.0, section 2."""
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, value = struct.unpack_from(f"{order}HHIH", data, place)
        if (tag, kind, number) == (_ORIENTATION, 3, 1):
            return value
    return None


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
            f"an image array of {array.dtype} and shape {list(array.shape)} should be uint8 or "
            "uint16 of shape [h, w] or [h, w, 1..4]"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    """Round 0..65535 to 0..255, so that white stays white (255 * 257 = 65535)."""
    return ((np.clip(array, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def _with_8_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" and its byte orders, or "I" that holds 16-bit values
        return Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode == "F":
        raise ValueError(
            "floating-point pixels have no fixed white, convert the file to 8 or 16 bits"
        )
    return image


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
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
    resized_size = (new_height, new_width)
    if new_height * new_width <= _MOST_WINDOWS * height * width:
        pixels = stretched(pixels, resized_size, resize)
    if crop == "center":
        (corner,) = corners(np.array([resized_size]), image_size, np.array([[0.5, 0.5]])).tolist()
        pixels = cut(pixels, resized_size, image_size, corner, resize)
    return Fitted(pixels, original_size, resized_size)


def stretched(
    pixels: np.ndarray,
    size: tuple[int, int],
    resize: str,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Resize [h, w, c], or a box (left, top, right, bottom) of it, to a size."""
    if size == pixels.shape[:2] and box is None:
        return pixels
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture = picture.resize((size[1], size[0]), RESIZE_FILTERS[resize], box)
    return np.asarray(picture).reshape(*size, pixels.shape[-1])


def corners(
    resized_sizes: np.ndarray, image_size: tuple[int, int], places: np.ndarray
) -> np.ndarray:
    """Find the (top, left) corners of windows that are cut out of images: int [b, 2].

    Args:
        resized_sizes: int [b, 2], (height, width) of the images.
        image_size: (height, width) of the windows.
        places: float [b, 2] or [1, 2] in [0, 1), which of the possible offsets; 0.5 is the middle.
    """
    return (places * (resized_sizes - np.array([image_size]) + 1)).astype(np.int64)


def cut(
    pixels: np.ndarray,
    resized_size: tuple[int, int],
    image_size: tuple[int, int],
    corner: Sequence[int],
    resize: str,
) -> np.ndarray:
    """Cut a window of image_size out of an image of resized_size, at its (top, left) corner.

    pixels: uint8 [h, w, c], the image; if it is not of resized_size yet, the part of it that the
    window shows is resized now (4000 x 16 pixels would cover 512 x 512 as 128,000 x 512).
    """
    (top, left), (height, width) = corner, image_size
    if pixels.shape[:2] == tuple(resized_size):
        return pixels[top : top + height, left : left + width]
    down, right = (old / new for old, new in zip(pixels.shape[:2], resized_size, strict=True))
    box = (left * right, top * down, (left + width) * right, (top + height) * down)
    return stretched(pixels, image_size, resize, box)


def to_float(images: np.ndarray) -> np.ndarray:
    """Scale uint8 0..255 to float32 in [-1, 1]: x / 127.5 - 1."""
    scaled = images.astype(np.float32)
    scaled /= 127.5  # in place: two temporaries of a large batch cost more than the arithmetic
    scaled -= 1
    return scaled


def check_size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Read an option that is one number, for squares, or a pair (height, width).

    Raises:
        ValueError: neither, or not positive.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(
            f"image_size = {image_size!r} should be a positive number of pixels or a pair (height, "
            "width)"
        )
    return size


def make_fit(
    *, channels: int, crop: str, resize: str, pad: int
) -> Callable[[bytes | np.ndarray, tuple[int, int]], Fitted]:
    """Check the options and make the function (encoded image, (height, width)) -> Fitted.

    channels: 1 (grayscale) or 3 (RGB). crop, resize, pad: see fit.
    Raises ValueError for an option outside its choices.
    """
    _check_channels(channels)
    for name, value, choices in (("crop", crop, CROPS), ("resize", resize, RESIZE_FILTERS)):
        if value not in choices:
            raise ValueError(f"{name} = {value!r} is unknown; choose from {', '.join(choices)}")
    if pad < 0:
        raise ValueError(f"pad = {pad} should be at least 0")

    def fit_encoded(image: bytes | np.ndarray, image_size: tuple[int, int]) -> Fitted:
        pixels = decode(image, channels)
        return fit(pixels, image_size=image_size, crop=crop, resize=resize, pad=pad)

    return fit_encoded


def _check_channels(channels: int) -> None:
    if channels not in MODES:
        raise ValueError(f"channels = {channels!r} should be 1 (grayscale) or 3 (RGB)")
