"""How much each record of a source counts: how often it comes, and the weight of its loss."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.progress import for_each
from diffusion_jax.data.records import Records, features_of

# The largest number that says how much a record counts.
LARGEST = 10**6

_log = logging.getLogger(__name__)


class Emphasis(NamedTuple):
    """How often each record comes in an epoch, int64 [n], and what its loss is multiplied by.

    None: all alike. weights: float32 [n].
    """

    repeats: np.ndarray | None = None
    weights: np.ndarray | None = None

    def count(self, num_records: int) -> int:
        """Count the records of an epoch, each as often as it comes."""
        return num_records if self.repeats is None else int(self.repeats.sum())

    def repeated(self, members: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        """Write every record number of each bucket as often as the record comes."""
        if self.repeats is None:
            return members
        return tuple(np.repeat(numbers, self.repeats[numbers]) for numbers in members)


ALIKE = Emphasis()


def read_emphasis(
    source: Records, *, repeats_key: str | None = None, weight_key: str | None = None
) -> Emphasis:
    """Read the features with these names of all records; None is all alike.

    Raises ValueError for no such feature, and for a value that is no whole number from 1 or no
    number from 0 to 1,000,000.
    """
    keys = {"repeats_key": repeats_key, "weight_key": weight_key}
    features = features_of(source) if repeats_key or weight_key else {}
    for argument, key in keys.items():
        if key is not None and key not in features:
            raise ValueError(
                f"{argument} = {key!r} is no feature; choose from {', '.join(features)}"
            )
    found = _read_all(source, [key for key in keys.values() if key is not None])
    repeats = None if repeats_key is None else found[repeats_key]
    weights = None if weight_key is None else found[weight_key]
    if repeats is not None:
        right = (repeats >= 1) & (repeats == np.floor(repeats))
        _check("repeats_key", repeats_key, repeats, right, "a whole number between 1 and")
        repeats = repeats.astype(np.int64)
    if weights is not None:
        _check("weight_key", weight_key, weights, weights >= 0, "a number between 0 and")
        weights = weights.astype(np.float32)
    return Emphasis(repeats, weights)


def with_weights(
    make: Callable[[int], dict[str, Any]], weights: np.ndarray | None, step: int
) -> dict[str, Any]:
    """Make batch `step` and add "loss_weight", float32 [b], the weights of its records.

    make: step -> a batch with "index", below 0 for padding, which has the weight 1. weights: of
    every record, None to add nothing.
    """
    batch = make(step)
    if weights is None:
        return batch
    index = batch["index"]
    return {**batch, "loss_weight": np.where(index < 0, np.float32(1.0), weights[index])}


def _read_all(source: Records, keys: list[str]) -> dict[str, np.ndarray]:
    """Read numbers of all records: name of a feature -> float64 [n]."""
    if not keys:
        return {}
    found = {key: np.empty(len(source), np.float64) for key in keys}

    def read(index: int) -> None:
        record = source[index]
        for key in keys:
            try:
                found[key][index] = record[key]
            except (TypeError, ValueError):
                found[key][index] = np.nan  # _check names the record

    seconds = for_each(len(source), read, f"reading {' and '.join(keys)} of records")
    _log.info("read %s of %d records in %.1f s", " and ".join(keys), len(source), seconds)
    return found


def _check(argument: str, key: Any, values: np.ndarray, right: np.ndarray, what: str) -> None:
    wrong = np.flatnonzero(~(right & (values <= LARGEST)))
    if len(wrong):
        raise ValueError(
            f"{argument} = {key!r}: record {wrong[0]} has {values[wrong[0]]:g} and should have "
            f"{what} {LARGEST}"
        )
