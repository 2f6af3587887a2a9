"""What a caller gives to a Pipeline besides conditions -> checked arrays and numbers."""

import logging
import operator
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jax.core import Tracer
from PIL import Image

from diffusion_jax.data.transforms import CorruptImageError, decode, open_picture, upright
from diffusion_jax.runs.inputs.fitting import Resize, fit_masks, fit_pixels

_log = logging.getLogger(__name__)

Picture: TypeAlias = np.ndarray | Image.Image
# Numbers of Python, NumPy or JAX, which `whole_number` and `number` check.
Whole: TypeAlias = Any
Number: TypeAlias = Any


def read_image(path: str | os.PathLike, channels: int, *, flag: str = "") -> np.ndarray:
    """Read a picture as the data of training are read: uint8 [h, w, channels], upright.

    Any format that PIL reads, 8 or 16 bits; transparency is composited on white. flag goes before
    the path in messages.
    Raises FileNotFoundError for what is no file, ValueError for a file that is no whole picture.
    """
    return _read(path, flag, lambda picture: decode(picture, channels))


def read_picture(path: str | os.PathLike, *, flag: str = "") -> Image.Image:
    """Read a picture with the opacity that it may have, upright; raises as `read_image` does."""
    return _read(path, flag, upright)


def read_animation(path: str | os.PathLike, *, flag: str = "") -> Image.Image:
    """Open a picture that may have several frames, as it is stored; raises as `read_image` does."""
    return _read(path, flag, open_picture)


def read_mask(path: str | os.PathLike, *, flag: str = "") -> np.ndarray:
    """Read a mask, white where the image is kept: float32 [h, w, 1] in [0, 1], upright.

    The shape may be in the colours or in the transparency, where what is opaque is kept.
    Raises as `read_image` does.
    """
    return as_mask(_read(path, flag, lambda picture: _with_opacity(open_picture(picture))))[0]


def as_image(
    name: str, image: Any, count: int, shape: tuple[int, int, int], resize: Resize = "resize"
) -> np.ndarray:
    """Make uint8 [count, *shape] of a PIL image or uint8 [h, w], [h, w, c] or [b, h, w, c].

    Pixels of another size are fitted, see fitting.fit_pixels, and the log says so. Raises
    ValueError for another dtype, other channels or another number of images.
    """
    rows = as_rows(name, image, count, shape)
    if rows.shape[1:] != shape:
        _say_fitted(name, rows.shape[1:3], shape, resize)
        rows = fit_pixels(rows, shape[:2], resize)
    return np.broadcast_to(rows, (count, *shape))


def as_rows(
    name: str, image: Any, count: int | None, shape: tuple[int | str, int | str, int]
) -> np.ndarray:
    """Make uint8 [b, h, w, c] of a PIL image or uint8 [h, w], [h, w, c] or [b, h, w, c].

    count: how many images there should be if not one; None for any number. shape: what it should
    be, for messages, and how many channels there are. Raises ValueError as as_image does.
    """
    if isinstance(image, Image.Image):
        image = decode(image, shape[-1])
    image = _host(name, image)
    if image.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {image.dtype}; it should be uint8 pixels")
    pixels = image[..., None] if image.ndim == 2 else image
    rows = pixels[None] if pixels.ndim == 3 else pixels
    counts = (count is None) or len(rows) in (1, count)
    if rows.ndim != 4 or rows.shape[-1] != shape[-1] or not counts or not rows.size:
        whole = str(("B" if count is None else count, *shape)).replace("'", "")
        one = str(shape).replace("'", "")
        raise ValueError(f"{name} has shape {image.shape}; it should be {one} or {whole}")
    return rows


def as_mask(
    mask: Any,
    count: int | None = None,
    size: tuple[int, int] | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    resize: Resize = "resize",
) -> np.ndarray:
    """Make float32 [count, *size, 1] in [0, 1] of a mask, 1 where the image is kept.

    mask: a PIL image or an array [h, w], [h, w, c], [b, h, w] or [b, h, w, c]: bool, numbers from 0
    to 1, or integers from 0 to 255 or 65535. Colours are averaged; where pixels have an opacity
    (c = 2 or 4), they count by it, and it is the mask where colours show no shape. Without count
    and size the mask keeps its own. A mask of another size is resized, and the log says so.
    image_size, resize: of the image that it belongs to, and how this is fitted; the mask goes with
    it, and what "pad" adds is not kept.
    Raises ValueError for other shapes and values.
    """
    if isinstance(mask, Image.Image):
        mask = _with_opacity(mask)
    given = _host("mask", mask)
    if given.ndim == 2 or (given.ndim == 3 and given.shape[-1] > 4):
        given = given[..., None]
    values = given[None] if given.ndim == 3 else given
    fits = values.ndim == 4 and values.shape[-1] <= 4 and values.size
    if not fits or (count is not None and len(values) not in (1, count)):
        wanted = "[h, w] or [h, w, c]" if size is None else f"{(*size, 1)} or {(count, *size, 1)}"
        raise ValueError(f"mask has shape {given.shape}; it should be {wanted}")
    values = _alpha_applied(_from_0_to_1(values))
    count, size = count or len(values), size or values.shape[1:3]
    if resize != "resize" and image_size is not None and values.shape[1:3] != image_size:
        _say_fitted("mask", values.shape[1:3], image_size, "resize")
        values = fit_masks(values, image_size, "resize")
    if values.shape[1:3] != size:
        _say_fitted("mask", values.shape[1:3], size, resize)
        values = fit_masks(values, size, resize)
    return np.broadcast_to(values, (count, *size, 1))


def as_floats(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Make float32 of `shape`; ValueError for another shape and for values that are not finite."""
    values = _host(name, values)
    if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
        raise ValueError(f"{name} has dtype {values.dtype}; it should be numbers")
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}; it should be {shape}")
    values = values.astype(np.float32)
    _check_finite(name, values)
    return values


def as_noises(
    count: int, total: int, shape: tuple[int, ...], latents: Any, noise: Any, steps: Any
) -> dict[str, np.ndarray]:
    """Check what is given of latents, noise and step_noise, for samples of a shape."""
    wanted = {
        "latents": (latents, (count, *shape)),
        "noise": (noise, (count, *shape)),
        "step_noise": (steps, (count, total, *shape)),
    }
    return {
        name: as_floats(name, values, shape)
        for name, (values, shape) in wanted.items()
        if values is not None
    }


def whole_number(name: str, value: Whole) -> int:
    """Return a Python, NumPy or JAX integer as an int; ValueError for anything else."""
    _check_not_traced(name, value)
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__") or np.ndim(value):
        raise ValueError(f"{name} = {value!r} should be a whole number")
    try:
        return operator.index(value)
    except TypeError as error:  # an array of another dtype
        raise ValueError(f"{name} = {value!r} should be a whole number") from error


def number(name: str, value: Number) -> float:
    """Return a Python, NumPy or JAX number as a float; ValueError for anything else, NaN too."""
    _check_not_traced(name, value)
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "fiu" or not np.isfinite(array):
        raise ValueError(f"{name} = {value!r} should be a finite number")
    return float(array)


def check_image_use(
    image: Picture | None,
    mask: Picture | None,
    strength: Number | None,
    *,
    is_read: bool = False,
) -> None:
    """Raise ValueError where image, mask and strength are not what goes together.

    is_read: the model reads the image itself, which then needs neither strength nor mask.
    """
    if strength is not None:
        number("strength", strength)
    if mask is not None and image is None:
        raise ValueError("inpainting needs both image and mask")
    if strength is None and image is not None and mask is None and not is_read:
        raise ValueError("an image needs strength, how much of it is redrawn, or a mask")
    if strength is not None and image is None:
        raise ValueError(f"strength = {strength} needs an image to begin with")


def steps_of_call(
    total: int,
    start: Number,
    end: Number,
    strength: Number | None,
    latents: np.ndarray | None,
) -> tuple[int, int] | None:
    """Find the steps (first, last) of a call; None where `strength` says how many."""
    steps = steps_of_shares(total, start, end)
    if strength is not None and (latents is not None or steps != (0, total)):
        raise ValueError(
            f"strength = {strength} cannot be joined with latents, denoising_start = {start} and "
            f"denoising_end = {end}"
        )
    if latents is None and start > 0.0:
        raise ValueError(
            f"denoising_start = {start} needs latents, x after that share of the steps"
        )
    return None if strength is not None else steps


def steps_of_shares(total: int, start: Number, end: Number) -> tuple[int, int]:
    """Turn shares of a run into its steps (first, last), rounded to the nearest step."""
    start, end = number("denoising_start", start), number("denoising_end", end)
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(
            f"denoising_start = {start}, denoising_end = {end} should be two numbers from 0 to 1 "
            "in this order"
        )
    steps = (round(start * total), round(end * total))
    if steps[0] == steps[1]:
        raise ValueError(
            f"denoising_start = {start}, denoising_end = {end} leave none of {total} steps"
        )
    return steps


def _read(path: str | os.PathLike, flag: str, act: Callable[[bytes], Any]) -> Any:
    try:
        return act(_bytes_of(pathlib.Path(path), flag))
    except CorruptImageError as error:
        raise ValueError(f"{flag}{path} is {error}") from error


def _bytes_of(path: pathlib.Path, flag: str) -> bytes:
    if not path.is_file():  # nor is a device or a pipe, which would never end
        why = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{flag}{path} {why}")
    return path.read_bytes()


def _with_opacity(picture: Image.Image) -> np.ndarray:
    """Decode to uint8 [h, w, 1], or [h, w, 2] with the opacity of a picture that has one."""
    if picture.mode.startswith("I") or not picture.has_transparency_data:
        return decode(picture, 1)
    rgba = picture.convert("RGBA")
    parts = [rgba.convert("RGB"), rgba.getchannel("A")]
    return np.concatenate([decode(part, 1) for part in parts], -1)


def _host(name: str, array: Any) -> np.ndarray:
    _check_not_traced(name, array)
    try:
        return np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{name} should be an array, and its rows differ in length") from error


def _check_not_traced(name: str, value: Any) -> None:
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} is traced by JAX and has no value yet; call a Pipeline outside of jax.jit, "
            "jax.vmap and jax.grad"
        )


def _from_0_to_1(values: np.ndarray) -> np.ndarray:
    kind = values.dtype.kind
    if kind not in "bfiu" and values.dtype.name != "bfloat16":
        raise ValueError(f"mask has dtype {values.dtype}; it should be numbers from 0 to 1")
    floats = values.astype(np.float32)
    _check_finite("mask", floats)
    if kind in "iu" and values.max() > 1:
        floats = floats / np.float32(255 if values.max() <= 255 else 65535)
    if floats.min() < 0.0 or floats.max() > 1.0:
        raise ValueError(
            f"mask has values from {values.min()} to {values.max()}; they should lie in [0, 1]"
        )
    return floats


def _alpha_applied(values: np.ndarray) -> np.ndarray:
    """Join colours and opacity to one channel: [b, h, w, c] -> [b, h, w, 1]."""
    if values.shape[-1] % 2:
        return values.mean(-1, keepdims=True)
    colour, alpha = values[..., :-1].mean(-1, keepdims=True), values[..., -1:]
    seen = colour[alpha > 0.0]
    if alpha.min() < 1.0 and seen.size and np.ptp(seen) == 0.0:
        return alpha
    return colour * alpha


def _say_fitted(name: str, old: tuple[int, ...], new: tuple[int, ...], resize: Resize) -> None:
    verb = {"resize": "resized", "crop": "cropped", "pad": "padded"}[resize]
    pair = (*old[:2], verb, *new[:2])
    _log.warning(f"{name} is %d x %d pixels and is %s to %d x %d", *pair)


def _check_finite(name: str, values: np.ndarray) -> None:
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ValueError(f"{name} has {bad} of {values.size} values that are not finite numbers")
