"""How far long work is: a bar on a terminal, else a line in the log now and then."""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.2
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
    start = said = time.monotonic()
    done = 0
    try:
        for item in items:
            now = time.monotonic()
            if done and now - said > pause:
                said, speed = now, done / (now - start)
                left = int((total - done) / speed)
                told = f"{done} of {total}, {speed:.1f} a second, "
                told += f"{left // 60} min {left % 60:02d} s left"
                if live:
                    draw_line(f"{doing} {bar(done / total)} {told}")
                else:
                    _log.info("%s: %s", doing, told)
            yield item
            done += size(item)
    finally:
        if live:
            draw_line("")


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
