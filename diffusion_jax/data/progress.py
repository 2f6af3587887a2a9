"""A line in the log now and then, for work on data that may take minutes."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


def log_progress(items: Iterable[T], total: int, doing: str) -> Iterator[T]:
    """Yield the items, and every ten seconds log "<doing>: <how many> of <total>"."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            _log.info("%s: %d of %d", doing, done, total)
        yield item
