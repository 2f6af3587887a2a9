"""How far long work is: a bar on a terminal, else a line in the log now and then."""

import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.2
# A network disk answers slowly but many at once: so many threads read, each so many at a time.
_READERS, _CHUNK = 16, 64
_BLOCKS = "░▏▎▍▌▋▊▉"

T = TypeVar("T")

_log = logging.getLogger(__name__)


def log_progress(
    items: Iterable[T], total: int, doing: str, *, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield the items, and tell how far the work is and how long it will take.

    On a terminal a bar redraws itself and is gone at the end; elsewhere a line goes to the log
    every ten seconds.

    total: sum of the sizes of all items. doing: how the line begins, such as "reading images".
    """
    live = sys.stderr.isatty()
    pause = SECONDS_BETWEEN_DRAWINGS if live else SECONDS_BETWEEN_LINES
    start = shown = time.monotonic()
    done = 0
    try:
        for item in items:
            now = time.monotonic()
            if done and now - shown > pause:
                shown, speed = now, done / (now - start)
                left = int((total - done) / speed)
                text = f"{done} of {total}, {speed:.1f} a second, "
                text += f"{left // 60} min {left % 60:02d} s left"
                if live:
                    draw_line(f"{doing} {bar(done / total)} {text}")
                else:
                    _log.info("%s: %s", doing, text)
            yield item
            done += size(item)
    finally:
        if live:
            draw_line("")


def for_each(count: int, read: Callable[[int], None], doing: str) -> float:
    """Call read with the numbers 0 ... count - 1 from several threads -> the seconds that it took.

    doing: as in log_progress. What read raises is raised here.
    """
    start = time.monotonic()

    def read_all(chunk: range) -> range:
        for number in chunk:
            read(number)
        return chunk

    chunks = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    with ThreadPoolExecutor(_READERS) as pool:
        numbers = itertools.chain.from_iterable(pool.map(read_all, chunks))
        for _ in log_progress(numbers, count, doing):
            pass
    return time.monotonic() - start


def bar(share: float, width: int = 16) -> str:
    """Draw a share from 0 to 1 as a bar of so many characters, to an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return (
        ("█" * full + (_BLOCKS[part] if full < width else "")).ljust(width, "░").replace(" ", "░")
    )


def draw_line(text: str) -> None:
    """Put a line in the place of the one that was drawn before, on the terminal of stderr."""
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write("\r" + text[:width].ljust(width) + ("" if text else "\r"))
    sys.stderr.flush()
