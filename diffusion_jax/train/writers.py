"""Where metrics go: metrics.jsonl, TensorBoard, image files, memory; behind clu's writer interface.

Synopsis:

    writer = open_writer(workdir, resume_step=step)      # on process 0; elsewhere it does nothing
    writer.write_scalars(100, {"train/loss": 0.1})
    writer.write_images(100, {"train/samples": images})  # uint8 [n h w c]
    writer.close()

A writer is a record of functions with the names and arguments of clu.metric_writers.MetricWriter,
so an object of clu can take its place and the other way round. (clu's own writers need TensorFlow.)
"""

import collections
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.train.pictures import image_grid, save_png

MAX_QUEUED = 64


def _ignore(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


class Writer(NamedTuple):
    """Six functions; those that a writer has no use for do nothing.

    write_scalars(step, {name: number}); write_images(step, {name: uint8 [n h w c]});
    write_texts(step, {name: str}); write_hparams({name: value}); flush(); close().
    Values are host values: a hook reads the device, a writer never does.
    """

    write_scalars: Callable[..., None] = _ignore
    write_images: Callable[..., None] = _ignore
    write_texts: Callable[..., None] = _ignore
    write_hparams: Callable[..., None] = _ignore
    flush: Callable[[], None] = _ignore
    close: Callable[[], None] = _ignore


def open_writer(
    workdir: str | os.PathLike, *, resume_step: int = 0, tensorboard: bool = True
) -> Writer:
    """Open what a run writes: metrics.jsonl, images/ and TensorBoard events, in the background.

    resume_step: number of steps that the run starts with; what was written for later steps goes.
    Process 0 writes, the others get a writer that does nothing.
    """
    if jax.process_index() != 0:
        return Writer()
    writers = [jsonl_writer(pathlib.Path(workdir) / "metrics.jsonl", resume_step=resume_step)]
    writers.append(image_writer(pathlib.Path(workdir) / "images"))
    if tensorboard:
        writers.append(tensorboard_writer(workdir, resume_step=resume_step))
    return background_writer(multi_writer(*writers))


def jsonl_writer(path: str | os.PathLike, *, resume_step: int = 0) -> Writer:
    """Append scalars to a file, one JSON object a line: {"step": 1, "time": 1.7e9, "loss": 0.1}.

    Every call is one line, on its way to the disk when the call returns, so a killed process loses
    at most a part of its last line; that part and all lines of steps after resume_step are removed
    here. NaN and the infinities, which JSON lacks, are the strings "NaN", "Infinity", "-Infinity"
    (float() takes them back; null would not tell a NaN from an overflow). "time" is seconds since
    1970. Images, texts and hyper-parameters leave no trace here.
    Raises ValueError naming the line when the file holds something else.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _keep_lines_up_to(path, resume_step)
    file = path.open("a", encoding="utf-8")

    def write_scalars(step: int, scalars: Mapping[str, Any]) -> None:
        reserved = {"step", "time"} & set(scalars)
        if reserved:
            raise ValueError(f"a metric cannot be called {sorted(reserved)[0]!r} in {path}")
        row = {"step": int(step), "time": round(time.time(), 3)}
        row |= {name: _json_number(value) for name, value in scalars.items()}
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()

    def flush() -> None:
        file.flush()
        os.fsync(file.fileno())

    return Writer(write_scalars=write_scalars, flush=flush, close=file.close)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, float | int]]:
    """Read the rows of a metrics.jsonl, with NaN and the infinities as floats again."""
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    return [{k: float(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]


def tensorboard_writer(logdir: str | os.PathLike, *, resume_step: int = 0) -> Writer:
    """Write TensorBoard events by tensorboardX; TensorBoard drops older events past resume_step."""
    from tensorboardX import SummaryWriter  # it takes a second to import

    events = SummaryWriter(str(logdir), purge_step=resume_step + 1 if resume_step else None)

    def write_scalars(step: int, scalars: Mapping[str, Any]) -> None:
        for name, value in scalars.items():
            events.add_scalar(name, float(value), step)

    def write_images(step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            events.add_image(name, image_grid(np.asarray(batch)), step, dataformats="HWC")

    def write_texts(step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            events.add_text(name, text, step)

    def write_hparams(hparams: Mapping[str, Any]) -> None:
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in hparams.items()
        }
        events.add_hparams(plain, {}, name="hparams")

    return Writer(
        write_scalars, write_images, write_texts, write_hparams, events.flush, events.close
    )


def image_writer(directory: str | os.PathLike) -> Writer:
    """Write images as directory/{name}_gs-{step:06d}.png, several at once as a grid of 4 columns.

    A name like "train/samples" makes a sub-folder; a file of the same step is replaced.
    """

    def write_images(step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, batch in images.items():
            path = pathlib.Path(directory) / f"{name}_gs-{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grid = image_grid(np.asarray(batch))
            save_png(path, grid)

    return Writer(write_images=write_images)


class Written(NamedTuple):
    """What a memory writer was given: {step: {name: value}} of each kind, and hparams."""

    scalars: dict[int, dict[str, float]]
    images: dict[int, dict[str, np.ndarray]]
    texts: dict[int, dict[str, str]]
    hparams: dict[str, Any]


def memory_writer() -> tuple[Writer, Written]:
    """Keep everything in dicts -> (writer, what was written), for tests and notebooks."""
    written = Written({}, {}, {}, {})

    def keep(kind: dict, step: int, values: Mapping[str, Any]) -> None:
        kind.setdefault(step, {}).update(values)

    return (
        Writer(
            write_scalars=lambda step, scalars: keep(written.scalars, step, scalars),
            write_images=lambda step, images: keep(written.images, step, images),
            write_texts=lambda step, texts: keep(written.texts, step, texts),
            write_hparams=lambda hparams: written.hparams.update(hparams),
        ),
        written,
    )


def multi_writer(*writers: Writer) -> Writer:
    """Pass every call on to all writers, in their order."""

    def to_all(name: str) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            for writer in writers:
                getattr(writer, name)(*args, **kwargs)

        return call

    return Writer(*(to_all(name) for name in Writer._fields))


def background_writer(writer: Writer) -> Writer:
    """Make a writer's calls return at once; one thread does the work, in order.

    What fails in the thread is raised by the next call; flush and close wait for everything.
    When MAX_QUEUED calls are waiting, the next one waits too.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="writer")
    queued: collections.deque[concurrent.futures.Future] = collections.deque()

    def submit(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        queued.append(pool.submit(function, *args, **kwargs))
        while queued and (queued[0].done() or len(queued) > MAX_QUEUED):
            queued.popleft().result()

    def finish(function: Callable[[], None]) -> None:
        submit(function)
        while queued:
            queued.popleft().result()

    def close() -> None:
        try:
            finish(writer.close)
        finally:
            pool.shutdown()

    return Writer(
        *(functools.partial(submit, function) for function in writer[:4]),
        flush=lambda: finish(writer.flush),
        close=close,
    )


def _json_number(value: Any) -> float | str:
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _keep_lines_up_to(path: pathlib.Path, last_step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the process was killed while it wrote this line
    kept = [line for i, line in enumerate(lines) if _step_of(line, i, path) <= last_step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _step_of(line: str, index: int, path: pathlib.Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} line {index + 1} is not a row of metrics with a step: {line[:60]!r}"
        ) from error
