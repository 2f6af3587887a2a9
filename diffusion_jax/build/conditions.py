"""What a user asks for -> the inputs that the embedders read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.build.network import Network

Conditions = int | str | Sequence[Any] | np.ndarray | Mapping[str, Any] | None


def encode_conditions(
    network: Network,
    conditions: Conditions,
    n: int | None,
    class_names: Callable[[], Sequence[str]],
) -> tuple[dict[str, np.ndarray], int]:
    """Turn class numbers or names (or arrays by input key) into embedder inputs -> (inputs, number
    of images).

    n repeats a single condition, or says how many images an unconditional model draws (default 1).
    Raises ValueError for a class that does not exist, a missing condition or a length that does
    not fit.
    """
    embedders = network.embedders
    if not embedders:
        if conditions is not None:
            raise ValueError(
                f"this model is unconditional, so conditions = {conditions!r} should be None"
            )
        return {}, 1 if n is None else _positive(n)
    if conditions is None:
        needed = ", ".join(embedder.input_key for embedder in embedders.values())
        raise ValueError(f"this model is conditional: give one {needed} for each image")
    if not isinstance(conditions, Mapping):
        if len(embedders) > 1:
            keys = sorted({embedder.input_key for embedder in embedders.values()})
            raise ValueError(
                f"this model has several conditions: give a dict with the keys {', '.join(keys)}"
            )
        conditions = {next(iter(embedders.values())).input_key: conditions}
    inputs = {}
    for name, embedder in embedders.items():
        if embedder.input_key not in conditions:
            raise ValueError(f"the embedder {name!r} needs conditions[{embedder.input_key!r}]")
        values = conditions[embedder.input_key]
        if embedder.num_classes is not None:
            values = [
                _label(value, embedder.num_classes, class_names) for value in _as_list(values)
            ]
            inputs[embedder.input_key] = np.asarray(values, np.int32)
        else:
            inputs[embedder.input_key] = np.asarray(values, np.float32)
    return _same_length(inputs, n)


def _same_length(inputs: dict[str, np.ndarray], n: int | None) -> tuple[dict[str, np.ndarray], int]:
    lengths = {key: len(value) for key, value in inputs.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"conditions of different lengths: {lengths}; give one of each for every image"
        )
    count = next(iter(lengths.values()))
    if n is None or n == count:
        return inputs, _positive(count)
    if count != 1:
        raise ValueError(
            f"n = {n} does not fit {count} conditions; give n = {count}, or one condition"
        )
    return {key: np.repeat(value, n, axis=0) for key, value in inputs.items()}, _positive(n)


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


def _positive(n: int) -> int:
    if n < 1:
        raise ValueError(f"n = {n} should be at least 1 image")
    return n
