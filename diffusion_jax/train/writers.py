"""Where metrics go: metrics.jsonl, TensorBoard and image files, in the background.

Synopsis:

    writer = open_writer(workdir, resume_step=step)      # on process 0; elsewhere it does nothing
    writer.write_scalars(100, {"train/loss": 0.1})
    writer.write_images(100, {"train/samples": images})  # uint8 [n h w c]
    writer.close()

A writer is a record of functions with the names and arguments of clu.metric_writers.MetricWriter.
"""

import functools
import json
import logging
import math
import os
import pathlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import jax
import numpy as np

from diffusion_jax.train.pictures import image_grid, save_png
from diffusion_jax.train.videos import save_clip

MAX_QUEUED = 64
_WAIT_SECONDS = 60.0
_LOOK_SECONDS = 0.01
_log = logging.getLogger(__name__)


# Of moving pictures, whose own speed nobody says here.
_FPS = 8.0


def _ignore(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


class Writer(NamedTuple):
    """Six functions; a writer that has no use for one leaves it out, and it does nothing.

    write_scalars(step, {name: number}); write_images(step, {name: uint8 [n h w c]});
    write_texts(step, {name: str}); write_hparams({path: value of the config}); flush(); close().
    Values lie on the host: hooks read the device, a writer never does.
    """

    write_scalars: Callable[..., None] = _ignore
    write_images: Callable[..., None] = _ignore
    write_texts: Callable[..., None] = _ignore
    write_hparams: Callable[..., None] = _ignore
    flush: Callable[[], None] = _ignore
    close: Callable[[], None] = _ignore


def open_writer(
    workdir: str | os.PathLike, *more: Writer, resume_step: int = 0, monitor: str | None = None
) -> Writer:
    """Open metrics.jsonl, images/ and TensorBoard events of a run, all written in the background.

    more: other writers beside these. resume_step: number of steps that the run starts with; what
    was written for later steps goes. monitor: the metric by which TensorBoard compares configs.
    Process 0 writes, the others get a writer that does nothing.
    """
    if jax.process_index() != 0:
        return Writer()
    workdir = pathlib.Path(workdir)
    return background_writer(
        jsonl_writer(workdir / "metrics.jsonl", resume_step=resume_step),
        image_writer(workdir / "images"),
        tensorboard_writer(workdir, resume_step=resume_step, monitor=monitor),
        *more,
    )


@final
class _Appended:
    """A file that grows by whole pieces: what cannot be written leaves nothing behind.

    When the file was deleted, moved or unmounted meanwhile, a new one is begun in its place.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Open a file to append to it, and make its folder."""
        self._path = path
        self._open()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("ab", buffering=0)

    def append(self, data: bytes) -> None:
        if not self._in_place():
            self._file.close()
            self._open()
            _log.warning("%s is gone: it goes on in a new file", self._path)
        size = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise

    def _in_place(self) -> bool:
        try:
            return not self._file.closed and os.path.samestat(
                self._path.stat(), os.fstat(self._file.fileno())
            )
        except FileNotFoundError:
            return False

    def flush(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def jsonl_writer(path: str | os.PathLike, *, resume_step: int = 0) -> Writer:
    """Append scalars to a file, one JSON object a line: {"step": 1, "time": 1.7e9, "loss": 0.1}.

    Every call is one line, handed to the operating system when the call returns. So a killed
    process loses at most a part of its last line; that part and all lines of steps after
    resume_step are removed here. NaN and the infinities, which JSON lacks, are the strings "NaN",
    "Infinity", "-Infinity" (float() takes them back; null would not tell a NaN from an overflow).
    "time" is seconds since 1970.
    Raises ValueError naming the line when the file holds something else.
    """
    path = pathlib.Path(path)
    if path.exists():
        _keep_lines_up_to(path, resume_step)
    file = _Appended(path)

    def write_scalars(step: int, scalars: Mapping[str, Any]) -> None:
        reserved = {"step", "time"} & set(scalars)
        if reserved:
            raise ValueError(f"a metric cannot be called {sorted(reserved)[0]!r} in {path}")
        row = {"step": int(step), "time": round(time.time(), 3)}
        row |= {name: _json_number(value) for name, value in scalars.items()}
        file.append((json.dumps(row, allow_nan=False) + "\n").encode())

    return Writer(write_scalars=write_scalars, flush=file.flush, close=file.close)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, float | int]]:
    """Read the rows of a metrics.jsonl, with NaN and the infinities as floats again.

    A last line that a killed process did not finish is left out.
    Raises ValueError naming the line when the file holds something else.
    """
    rows = [row for _, row in _rows(pathlib.Path(path))]
    return [{k: float(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]


def tensorboard_writer(
    logdir: str | os.PathLike, *, resume_step: int = 0, monitor: str | None = None
) -> Writer:
    """Write a file of TensorBoard events; TensorBoard drops older events past resume_step.

    monitor: the metric that stands beside the config in the tab HPARAMS.

    tensorboardX encodes the events. Its own writer is not used: it has a thread that dies of the
    first error, after which its queue is never read and whoever writes waits for ever.
    """
    from tensorboardX import summary  # it takes a second to import
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
    from tensorboardX.record_writer import masked_crc32c

    name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{socket.gethostname()}"
    file = _Appended(pathlib.Path(logdir) / name)

    def add(**fields: Any) -> None:
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        file.append(length + next(sums) + data + next(sums))

    def write_scalars(step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            add(step=step, summary=summary.scalar(name, float(value)))

    def write_images(step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            grid = image_grid(np.asarray(batch))
            add(step=step, summary=summary.image(name, grid, dataformats="HWC"))

    def write_texts(step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            add(step=step, summary=summary.text(name, text))

    def write_hparams(hparams: Mapping[str, Any]) -> None:
        plain = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in hparams.items()}
        for part in summary.hparams(plain, {} if monitor is None else {monitor: 0.0}):
            add(summary=part)

    add(file_version="brain.Event:2")
    if resume_step:
        add(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))
    written = (write_scalars, write_images, write_texts, write_hparams)
    return Writer(*written, flush=file.flush, close=file.close)


def image_writer(directory: str | os.PathLike) -> Writer:
    """Write images as directory/{name}_gs-{step:06d}.png, several at once as a grid of 4 columns.

    A name like "train/samples" makes a sub-folder; a file of the same step is replaced. A moving
    picture, uint8 [1 t h w c], becomes a .gif. A text whose name has a sub-folder, such as the
    captions of pictures, becomes a .txt.
    """

    def write_images(step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            moving, pictures = np.ndim(batch) == 5, np.asarray(batch)
            ending = "gif" if moving else "png"
            path = pathlib.Path(directory) / f"{name}_gs-{step:06d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if moving:
                save_clip(path, pictures[0], fps=_FPS)
            else:
                save_png(path, image_grid(pictures))

    def write_texts(step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            if "/" in name:
                path = pathlib.Path(directory) / f"{name}_gs-{step:06d}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")

    return Writer(write_images=write_images, write_texts=write_texts)


def background_writer(*writers: Writer) -> Writer:
    """Pass every call on to all writers, by one thread, in order; the calls return at once.

    What cannot be written causes one warning and never ends the training; the other writers
    go on. When MAX_QUEUED calls wait, the next one waits too. flush and close wait for all calls
    before them. No wait takes longer than a minute, or than the thread lives: then the call is
    dropped, with a warning.
    """
    background = _Background()

    def to_all(name: str) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            for writer in writers:
                background.do(functools.partial(getattr(writer, name), *args, **kwargs))

        return call

    def flush() -> None:
        to_all("flush")()
        background.finish()

    def close() -> None:
        to_all("close")()
        background.do(None)
        background.finish()

    return Writer(*map(to_all, Writer._fields[:4]), flush=flush, close=close)


@final
class _Background:
    """A thread that does calls one after another, and tells each kind of error once."""

    def __init__(self) -> None:
        """Start the thread; a daemon, so that a disk that hangs does not keep the process."""
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_QUEUED)
        self._told: set[str] = set()
        self._patience = _WAIT_SECONDS
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def do(self, call: Callable[[], None] | None) -> None:
        """Queue a call; None ends the thread."""
        if self._wait(lambda: not self._calls.full()):
            self._calls.put(call)

    def finish(self) -> None:
        """Wait until all queued calls are done."""
        self._wait(lambda: self._calls.unfinished_tasks == 0)

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Return whether it got ready while the thread lived, in time."""
        until = time.monotonic() + self._patience
        while not ready():
            if not self._thread.is_alive() or time.monotonic() > until:
                self._patience = 0.0  # whoever waited in vain once does not wait again
                self._tell("the disk, or the thread that writes, does not answer", "")
                return False
            time.sleep(_LOOK_SECONDS)
        self._patience = _WAIT_SECONDS
        return True

    def _work(self) -> None:
        call = self._calls.get()
        while call is not None:
            try:
                call()
            except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
                kind = error.strerror if isinstance(error, OSError) else str(error)
                self._tell(kind or type(error).__name__, f" ({error})")
            self._calls.task_done()
            call = self._calls.get()
        self._calls.task_done()

    def _tell(self, kind: str, more: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("some metrics are not written: %s%s; training goes on", kind, more)


def _json_number(value: Any) -> float | str:
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _keep_lines_up_to(path: pathlib.Path, last_step: int) -> None:
    kept = [line for line, row in _rows(path) if row["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _rows(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Read the whole lines of a metrics.jsonl -> [(line, row)]; ValueError for another content."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # the process was killed while it wrote this line
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path} line {number} is not a row of metrics with a step: {line[:60]!r}"
            ) from error
        rows.append((line, row))
    return rows
