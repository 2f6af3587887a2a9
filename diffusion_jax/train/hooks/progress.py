"""Tell a person how the training goes: a line that redraws itself, or a log line now and then."""

import collections
import datetime
import io
import shutil
import sys
import time
from collections.abc import Callable

import jax

from diffusion_jax.data.progress import bar
from diffusion_jax.train.hooks.scalars import Speed, memory_gib
from diffusion_jax.train.hooks.validation import Scores
from diffusion_jax.train.loop import Event, Hook, Stop, check_every

_REDRAW_SECONDS = 0.2
_WINDOW = 50  # readings that the speed is averaged over


def progress(
    *,
    num_steps: int,
    speed: Speed | None = None,
    every: int = 100,
    metric: str = "loss",
    stream: io.TextIOBase | None = None,
    lr_at: Callable[[int], float] | None = None,
    scores: Scores | None = None,
    monitor: str | None = None,
) -> Hook:
    """Make the hook: step, percent, metric, images/s (or steps/s), MFU, time spent and time to go.

    On a terminal the line redraws itself, with a bar, the learning rate, the monitored score (else
    any score) and the memory of the device; elsewhere it is written every `every` steps. The step
    that it shows is done. Only process 0 speaks. stream: sys.stderr by default.
    """
    check_every(every)
    out = sys.stderr if stream is None else stream
    if jax.process_index() != 0:
        return Hook(lambda step: False, lambda event: None)
    live = out.isatty()
    previous: Event | None = None
    started = time.perf_counter()
    readings: collections.deque[tuple[float, int]] = collections.deque(maxlen=_WINDOW)

    def show(event: Event, end: str) -> None:
        value = float(jax.device_get(event.metrics[metric]))
        readings.append((time.perf_counter(), event.step))
        step = f"step {event.step}/{num_steps} ({100 * event.step // num_steps}%)"
        rest = _line(readings, started, num_steps, speed, f"{metric} {value:.4f}")
        text = "  ".join([step, *rest])
        if live:
            more = _state(event.step, lr_at, scores or {}, monitor)
            text = "  ".join([f"{step} {bar(event.step / num_steps)}", *rest, *more])
            width = shutil.get_terminal_size().columns - 1
            text = "\r" + text[:width].ljust(width)
        out.write(text + end)
        out.flush()

    def wanted(step: int) -> bool:
        if not readings:  # the first step: from here the speed counts
            return True
        if live:
            return time.perf_counter() - readings[-1][0] >= _REDRAW_SECONDS
        return step % every == 0

    def act(event: Event) -> None:
        nonlocal previous
        if previous is not None and wanted(previous.step):
            show(previous, "" if live else "\n")
        previous = event._replace(state=None, batch=None)

    def end(event: Event, stop: Stop | None) -> None:
        show(event, "\n")

    return Hook(lambda step: True, act, end)


def _line(
    readings: collections.deque[tuple[float, int]],
    started: float,
    num_steps: int,
    speed: Speed | None,
    metric: str,
) -> list[str]:
    (then, first), (now, step) = readings[0], readings[-1]
    parts = [metric]
    spent = _duration(now - started)
    if step > first:
        rate = (step - first) / (now - then)
        parts.append(
            f"{rate:.2f} steps/s" if speed is None else f"{rate * speed.images:.1f} images/s"
        )
        utilisation = None if speed is None else speed.utilisation(rate)
        if utilisation is not None:
            parts.append(f"{utilisation:.1%} MFU")
        parts.append(f"{spent} spent, {_duration((num_steps - step) / rate)} to go")
    else:
        parts.append(f"{spent} spent")
    return parts


def _state(
    step: int, lr_at: Callable[[int], float] | None, scores: Scores, monitor: str | None
) -> list[str]:
    parts = [] if lr_at is None else [f"lr {float(lr_at(step - 1)):.2g}"]
    for found in [scores[max(scores)]] if scores else []:
        name = monitor if monitor in found else next(iter(found))
        parts.append(f"{name} {found[name]:.4f}")
    used = memory_gib()
    return parts + [f"{value:.1f} GiB" for value in list(used.values())[:1]]


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
