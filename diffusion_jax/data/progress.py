"""A line in the log now and then, for work on data that may take minutes."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


def log_progress(
    items: Iterable[T], total: int, doing: str, *, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield the items, and log every ten seconds how far the work is and how long it will take.

    total: sum of the sizes of all items. doing: how the line begins, such as "reading images".
    """
    start = said = time.monotonic()
    done = 0
    for item in items:
        now = time.monotonic()
        if done and now - said > SECONDS_BETWEEN_LINES:
            said, speed = now, done / (now - start)
            left = int((total - done) / speed)
            _log.info(
                "%s: %d of %d, %.1f a second, %d min %02d s left",
                doing, done, total, speed, left // 60, left % 60,
            )  # fmt: skip
        yield item
        done += size(item)
