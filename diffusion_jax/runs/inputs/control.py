"""What a caller gives to the ControlNets of a model -> inputs of a call."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.data.hints import HINTS
from diffusion_jax.experiment.network.control import scale_key
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.models.conditioning.routing import HINT
from diffusion_jax.runs.inputs.arrays import Number, Picture, as_image, number, read_image
from diffusion_jax.runs.inputs.conditions import Conditions, by_input

# One for each ControlNet, or one for all.
ControlImage = Picture | Mapping[str, Picture] | None
ControlScale = Number | Mapping[str, Number] | None


def with_control(
    network: Network,
    conditions: Conditions,
    image: ControlImage,
    scale: ControlScale,
    size: tuple[int, int],
) -> Conditions:
    """Add to the conditions of a call what ControlNets see, and how much each of them counts.

    image: uint8 [h, w], [h, w, 3] or [b, h, w, 3], or a PIL image; a dict by name where the model
    has several ControlNets. Another size is resized, and the log says so. scale: a number or a
    dict by name, None for 1.
    Raises ValueError where both do not fit the model.
    """
    names = list(network.controls)
    if not names:
        if image is not None or scale is not None:
            raise ValueError(
                "control_image and conditioning_scale do not fit: this model has no ControlNet; "
                "config.control names one"
            )
        return conditions
    if image is None:
        raise ValueError(f"control_image is missing: this model has the ControlNet {_few(names)}")
    images = _by_name("control_image", image, names)
    found: dict[str, Any] = dict(by_input(network, conditions))
    for name, picture in images.items():
        column = network.embedders[HINT.format(name)].input_key
        found[column] = _hint(picture, size)
    for name, value in _by_name(
        "conditioning_scale", 1.0 if scale is None else scale, names
    ).items():
        found[scale_key(name)] = [[number("conditioning_scale", value)]]
    return found


def read_control(text: str, *, flag: str) -> tuple[np.ndarray, float]:
    """Read "[canny:]FILE[:SCALE]" -> (picture, scale); canny makes the hint of a photo.

    Raises ValueError for a scale that is no number, and what read_image raises.
    """
    made, _, rest = text.partition(":")
    path = rest if made in HINTS else text
    before, colon, last = path.rpartition(":")
    scale = 1.0
    if colon and "/" not in last:
        try:
            path, scale = before, float(last)
        except ValueError as error:
            raise ValueError(f"{flag}{text} should be FILE:SCALE, such as {before}:0.8") from error
    picture = read_image(path, 3, flag=flag)
    if made in HINTS:
        hint = HINTS[made](picture[None].astype(np.float32) / 127.5 - 1.0)[0]
        picture = np.rint((hint + 1.0) * 127.5).astype(np.uint8)
    return picture, scale


def _by_name(what: str, given: Any, names: list[str]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        if what == "control_image" and len(names) > 1:
            raise ValueError(f"{what} should be a dict with a picture for each of {_few(names)}")
        return dict.fromkeys(names, given)
    if set(given) != set(names):
        raise ValueError(f"{what} has {_few(list(given))}; it should have {_few(names)}")
    return dict(given)


def _hint(picture: Any, size: tuple[int, int]) -> np.ndarray:
    if isinstance(picture, np.ndarray) and picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    count = len(picture) if isinstance(picture, np.ndarray) and picture.ndim == 4 else 1
    pixels = as_image("control_image", picture, count, (*size, 3))
    return pixels.astype(np.float32) / 127.5 - 1.0


def _few(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
