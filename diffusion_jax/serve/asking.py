"""What a page asks for -> the options of a Pipeline's call; everything is checked and limited."""

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.data.transforms import CorruptImageError, decode, open_picture, size_of
from diffusion_jax.experiment.config.binding import check_range
from diffusion_jax.experiment.sampling import SAMPLERS, names_of_samplers
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.inputs.arrays import as_mask
from diffusion_jax.runs.inputs.conditions import required_inputs

MOST_IMAGES, MOST_STEPS, MOST_SIDE, MOST_LETTERS = 64, 1000, 2048, 4000
# Names of what may be asked for, with the type of each.
_FIELDS: dict[str, type] = {
    "condition": str, "negative": str, "n": int, "num_steps": int, "guidance_scale": float,
    "seed": int, "sampler": str, "image": str, "mask": str, "strength": float,
}  # fmt: skip
_LARGEST_SEED = 2**53  # what a page can count to


class Asked(NamedTuple):
    """A sampler, "" for the config's, and what a Pipeline is called with."""

    sampler: str
    conditions: Any
    options: dict[str, Any]


def describe(pipe: Pipeline) -> dict[str, Any]:
    """Tell a page what the model takes, and where its fields begin.

    Raises ValueError for a model of videos.
    """
    network, drawing = pipe.experiment.network, pipe.experiment.drawing
    if network.num_frames is not None:
        raise ValueError("the playground draws images, and this model draws videos: use sample")
    text = "caption" in required_inputs(network)
    classes: list[str] = []
    if network.embedders and not text:
        names = pipe.class_names
        classes = list(names) if names else [str(i) for i in range(pipe.num_classes())]
    return {
        "name": repr(pipe),
        "takes": "text" if text else "class" if classes else "nothing",
        "classes": classes,
        "num_steps": drawing.num_steps,
        "samplers": names_of_samplers(network, drawing.noise),
        "size": list(pipe.experiment.data.image_shape[:2]),
        "most": {"n": MOST_IMAGES, "num_steps": MOST_STEPS},
    }


def read(asked: Mapping[str, Any], pipe: Pipeline) -> Asked:
    """Check what a page asks for; ValueError names the field, its value and what would be right."""
    for name, value in asked.items():
        if name not in _FIELDS:
            raise ValueError(f"{name} is not a field; choose from {', '.join(_FIELDS)}")
        _check_type(name, value, _FIELDS[name])
    given = {name: value for name, value in asked.items() if value not in (None, "")}
    for name in ("condition", "negative"):
        if len(given.get(name, "")) > MOST_LETTERS:
            raise ValueError(f"{name} has {len(given[name])} letters; {MOST_LETTERS} are the most")
    _check_range(given, "n", 1, MOST_IMAGES)
    _check_range(given, "num_steps", 1, MOST_STEPS)
    _check_range(given, "seed", -_LARGEST_SEED, _LARGEST_SEED)
    _check_range(given, "guidance_scale", -10_000, 10_000)
    _check_range(given, "strength", 0, 1)
    options = {
        name: float(given[name]) if _FIELDS[name] is float else given[name]
        for name in ("negative", "n", "num_steps", "guidance_scale", "seed", "strength")
        if name in given
    }
    options = {"n": 4, "seed": 0} | options
    channels = pipe.experiment.data.image_shape[-1]
    if "image" in given:
        options["image"] = _picture("image", given["image"], lambda image: decode(image, channels))
    if "mask" in given:
        options["mask"] = _picture("mask", given["mask"], lambda mask: as_mask(open_picture(mask)))
    sampler = given.get("sampler", "")
    if sampler and sampler not in SAMPLERS:
        raise ValueError(f"sampler = {sampler!r} is unknown; choose from {', '.join(SAMPLERS)}")
    return Asked(sampler, given.get("condition"), options)


def _check_type(name: str, value: Any, wanted: type) -> None:
    number = wanted is float and isinstance(value, int) and not isinstance(value, bool)
    right = value is None or number or (isinstance(value, wanted) and not isinstance(value, bool))
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        kinds = {str: "a text", int: "a whole number", float: "a number"}
        raise ValueError(f"{name} = {str(value)[:40]!r} should be {kinds[wanted]}")


def _check_range(given: Mapping[str, Any], name: str, low: int, high: int) -> None:
    if name in given:
        check_range(given[name], name, low=low, high=high)


def _picture(name: str, text: str, read_it: Callable[[bytes], Any]) -> Any:
    """Read a data URL of a picture, as a page sends it."""
    _, _, data = text.partition(";base64,")
    try:
        content = base64.b64decode(data, validate=True)
        height, width = size_of(content)
        if max(height, width) > MOST_SIDE:
            raise ValueError(
                f"{name} has {width} x {height} pixels; {MOST_SIDE} is the longest side"
            )
        return read_it(content)
    except (binascii.Error, CorruptImageError) as error:
        raise ValueError(f"{name} is not a readable picture: {error}") from error
