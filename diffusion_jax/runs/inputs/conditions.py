"""What a user asks for -> the inputs that the embedders read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.experiment.network.frames import FRAME, NOISED_FRAME
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.conditioning.routing import HINT
from diffusion_jax.runs.inputs.prompts import tokens_of
from diffusion_jax.wording import counted

# What is drawn in one call lies in the memory of the host.
MOST_IMAGES = 1_000_000
# What a user calls the picture that a clip of video starts from.
FRAME_NAME = "image"

Conditions = int | str | Sequence[Any] | np.ndarray | Mapping[str, Any] | None


def encode_conditions(
    network: Network,
    conditions: Conditions,
    n: int | None,
    class_names: Callable[[], Sequence[str]],
    size: tuple[int, int] | None = None,
    *,
    weighted: bool | None = None,
) -> tuple[dict[str, np.ndarray], int]:
    """Turn prompts, class numbers or names into embedder inputs -> (inputs, number of images).

    n repeats a single condition, or says how many images an unconditional model draws (default 1).
    size: (height, width) in pixels, the default of inputs that describe it. weighted: whether
    brackets in prompts weigh words, None for what the model was trained with.
    Raises ValueError for a class that does not exist, a prompt that is too long, a missing
    condition or a length that does not fit.
    """
    if not network.embedders:
        if conditions is not None:
            raise ValueError(
                f"this model is unconditional, so conditions = {conditions!r} should be None"
            )
        return {}, 1 if n is None else check_count(n)
    given = by_input(network, conditions)
    inputs: dict[str, np.ndarray] = {}
    defaults: dict[str, np.ndarray] = {}
    for name, embedder in network.embedders.items():
        if input_name(embedder) in given:
            values = given[input_name(embedder)]
            inputs[_key(embedder)] = _encode(network, embedder, values, class_names, weighted)
        elif embedder.staged is not None:
            continue  # see redrawing.image_inputs
        elif embedder.default is None:
            raise ValueError(f"the embedder {name!r} needs conditions[{input_name(embedder)!r}]")
        else:
            row = size if embedder.default == "size" else embedder.default
            defaults[embedder.input_key] = np.asarray([row], embedder.dtype)
    inputs, count = _same_length(inputs, n)
    return inputs | {key: np.repeat(row, count, axis=0) for key, row in defaults.items()}, count


def encode_negative(
    network: Network, negative: Conditions, count: int, *, weighted: bool | None = None
) -> dict[str, np.ndarray] | None:
    """Turn a negative prompt, or a dict by input, into inputs of guidance; None stays None.

    Raises ValueError as encode_conditions does, and when no embedder reads such an input.
    """
    if negative is None:
        return None
    if not isinstance(negative, Mapping):
        texts = {e.text.source for e in network.embedders.values() if e.text is not None}
        if len(texts) != 1:
            raise ValueError(
                f"negative = {negative!r} should be a dict by input: this model reads "
                f"{len(texts)} texts"
            )
        negative = {texts.pop(): negative}
    known = {input_name(embedder) for embedder in network.embedders.values()}
    for key in negative:
        if key not in known:
            raise ValueError(f"negative[{key!r}] is no input; choose from {', '.join(known)}")
    inputs = {
        embedder.input_key: _encode(
            network, embedder, negative[input_name(embedder)], tuple, weighted
        )
        for embedder in network.embedders.values()
        if input_name(embedder) in negative
    }
    found, length = _same_length(inputs, None)
    if length not in (1, count):
        raise ValueError(
            f"there are {length} negative conditions for {counted(count, 'image', 'images')}; give "
            f"{count if count == 1 else f'1 or {count}'}"
        )
    return {key: np.repeat(value, count // length, axis=0) for key, value in found.items()}


def input_name(embedder: Embedder) -> str:
    """Name what a user gives to an embedder: the text that its tokens come from, or its input."""
    if _key(embedder) == FRAME:
        return FRAME_NAME
    return embedder.input_key if embedder.text is None else embedder.text.source


def _key(embedder: Embedder) -> str:
    # The frame with noise is made of the frame.
    return FRAME if embedder.input_key == NOISED_FRAME else embedder.input_key


def required_inputs(network: Network) -> list[str]:
    """Name the conditions that have no default, each once; images are arguments of their own."""
    hints = [HINT.format(name) for name in network.controls]
    names = (
        input_name(embedder)
        for name, embedder in network.embedders.items()
        if embedder.default is None and embedder.staged is None and name not in hints
    )
    return list(dict.fromkeys(names))


def by_input(network: Network, conditions: Conditions) -> Mapping[str, Any]:
    """Give each condition the name of its input; ValueError where it has none, or several fit."""
    needed = required_inputs(network)
    if conditions is None and not needed:
        return {}
    if conditions is None:
        raise ValueError(f"this model is conditional: give one {', '.join(needed)} for each image")
    if isinstance(conditions, Mapping):
        known = {input_name(embedder) for embedder in network.embedders.values()}
        for key in conditions:
            if key not in known:
                raise ValueError(
                    f"conditions[{key!r}] is no input; choose from {', '.join(sorted(known))}"
                )
        return conditions
    if len(needed) != 1:
        raise ValueError(
            "this model has several conditions: give a dict with the keys "
            f"{', '.join(sorted(needed))}"
        )
    return {needed[0]: conditions}


def _encode(
    network: Network,
    embedder: Embedder,
    values: Any,
    class_names: Callable[[], Sequence[str]],
    weighted: bool | None,
) -> np.ndarray:
    if embedder.text is not None:
        _, tokenize = network.tokenize[embedder.input_key]
        return tokens_of(tokenize, input_name(embedder), _as_list(values), weighted)
    if embedder.num_classes is not None:
        labels = [_label(value, embedder.num_classes, class_names) for value in _as_list(values)]
        return np.asarray(labels, np.int32)
    array = np.asarray(values, np.float32 if embedder.channels is not None else embedder.dtype)
    if embedder.shape == (1,) and array.shape[1:] != (1,):
        array = array[..., None]  # one number each
    if embedder.channels is None and array.shape == embedder.shape:
        array = array[None]  # one row for all images
    if embedder.channels is None and array.shape[1:] != embedder.shape:
        raise ValueError(
            f"conditions[{embedder.input_key!r}] has the shape {array.shape}; it should be "
            f"{embedder.shape} or {('n', *embedder.shape)}"
        )
    return array


def _same_length(inputs: dict[str, np.ndarray], n: int | None) -> tuple[dict[str, np.ndarray], int]:
    lengths = {key: len(value) for key, value in inputs.items()}
    counts = set(lengths.values()) - {1}
    if len(counts) > 1:
        raise ValueError(
            f"conditions of different lengths: {lengths}; give one of each for every image, or one"
        )
    found = counts.pop() if counts else 1
    if n is not None and found not in (1, n):
        raise ValueError(
            f"n = {n} does not fit {found} conditions; give n = {found}, or one condition"
        )
    count = check_count(n if n is not None and found == 1 else found)
    spread = {
        key: np.repeat(value, count, axis=0) if len(value) == 1 else value
        for key, value in inputs.items()
    }
    return spread, count


def _label(value: Any, num_classes: int, class_names: Callable[[], Sequence[str]]) -> int:
    if isinstance(value, str) and not value.lstrip("-").isdigit():
        names = list(class_names())
        if value not in names:
            raise ValueError(f"class {value!r} is unknown; choose from {', '.join(names[:20])}")
        return names.index(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, str | int | np.integer):
        raise ValueError(f"class {value!r} should be a whole number or a name")
    label = int(value)
    if not 0 <= label < num_classes:
        raise ValueError(
            f"class {label} is out of range; this model has the classes 0 to {num_classes - 1}"
        )
    return label


def _as_list(values: Any) -> list[Any]:
    return [values] if np.ndim(values) == 0 else list(values)


def check_count(n: int) -> int:
    """Return a number of images; ValueError for none and for more than one call can hold."""
    if not 1 <= n <= MOST_IMAGES:
        raise ValueError(
            f"n = {n} should be at least 1 image and at most {MOST_IMAGES:,} in a call"
        )
    return n
