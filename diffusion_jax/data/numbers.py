"""Numbers of records that become columns of a batch: of a record, or of each of its frames."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class NumberNames(NamedTuple):
    """The fields of records that are numbers: of each record, or of each of its frames."""

    of_records: tuple[str, ...] = ()
    of_frames: tuple[str, ...] = ()

    def among(self, features: Mapping[str, Any]) -> "NumberNames":
        """Keep the names of fields that a source has; a model may have defaults for others."""
        return NumberNames(*(tuple(name for name in own if name in features) for own in self))


NONE = NumberNames()


def numbers_of(
    names: NumberNames, fields: Mapping[str, Any], count: int, chosen: Sequence[int], record: str
) -> dict[str, np.ndarray]:
    """Read the numbers of a record: float32 [d], or [t d] of frames, with d = 1 for single numbers.

    count: how many frames the record has. chosen: which of them a clip shows. record: for messages.

    Raises:
        ValueError: a value that is no finite number, or another number of rows than of frames.
    """
    found = {name: _finite(name, fields[name], record).reshape(-1) for name in names.of_records}
    for name in names.of_frames:
        rows = _finite(name, fields[name], record)
        if not rows.ndim or len(rows) != count:
            raise ValueError(
                f"{record}: {name} has {rows.size if rows.ndim < 2 else len(rows)} numbers and "
                f"should have {count}, one for each frame"
            )
        found[name] = rows.reshape(count, -1)[list(chosen)]
    return found


def _finite(name: str, value: Any, record: str) -> np.ndarray:
    try:
        numbers = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        numbers = np.full(1, np.nan, np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{record}: {name} = {value!r:.80} should be finite numbers")
    return numbers
