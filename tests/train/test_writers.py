import json
import math
import struct
import threading
import time

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from diffusion_jax.train import writers
from diffusion_jax.train.writers import (
    Writer,
    background_writer,
    image_writer,
    jsonl_writer,
    memory_writer,
    multi_writer,
    open_writer,
    read_jsonl,
    tensorboard_writer,
)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def strict_rows(path):
    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text().splitlines()]


def test_jsonl_is_one_object_a_line_on_disk_at_once(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = jsonl_writer(path)
    writer.write_scalars(10, {"train/loss": np.float32(0.5), "lr": 1e-4})
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows(path)] == [
        {"step": 10, "train/loss": 0.5, "lr": 1e-4}
    ]
    assert abs(rows(path)[0]["time"] - time.time()) < 60
    writer.write_scalars(20, {"train/loss": 0.25})
    assert [row["step"] for row in rows(path)] == [10, 20]
    writer.close()


def test_jsonl_writes_nan_and_infinity_as_strings_that_float_reads(tmp_path):
    path = tmp_path / "metrics.jsonl"
    jsonl_writer(path).write_scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    row = strict_rows(path)[0]
    assert (row["a"], row["b"], row["c"]) == ("NaN", "Infinity", "-Infinity")
    back = read_jsonl(path)[0]
    assert math.isnan(back["a"]) and back["b"] == math.inf and back["c"] == -math.inf


def test_jsonl_resume_drops_later_steps_and_the_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = jsonl_writer(path)
    for step in (10, 20, 30, 40):
        writer.write_scalars(step, {"loss": step})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 15, "lo')
    writer = jsonl_writer(path, resume_step=25)
    assert [row["step"] for row in rows(path)] == [10, 20]
    writer.write_scalars(30, {"loss": 0.0})
    assert [row["step"] for row in rows(path)] == [10, 20, 30]
    assert list(tmp_path.iterdir()) == [path]


def test_jsonl_at_step_zero_starts_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    jsonl_writer(path).write_scalars(10, {"loss": 1.0})
    jsonl_writer(path)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', '{"step": null}'])
def test_jsonl_refuses_a_file_that_is_something_else(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl line 2"):
        jsonl_writer(path, resume_step=5)
    assert line in path.read_text()


def test_jsonl_keeps_its_own_columns(tmp_path):
    with pytest.raises(ValueError, match="'step'"):
        jsonl_writer(tmp_path / "m.jsonl").write_scalars(1, {"step": 2})


def tensorboard_events(folder):
    """Read event files, oldest first: records of [length u64, crc u32, data, crc u32]."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def tags(events, kind):
    return [
        (event.step, value.tag)
        for event in events
        for value in event.summary.value
        if value.WhichOneof("value") == kind
    ]


def test_tensorboard_events_read_back(tmp_path):
    writer = tensorboard_writer(tmp_path)
    writer.write_scalars(3, {"train/loss": 0.5})
    writer.write_images(3, {"train/samples": np.zeros((3, 8, 8, 3), np.uint8)})
    writer.write_texts(3, {"note": "hello"})
    writer.write_hparams({"lr": 0.1, "betas": (0.9, 0.99)})
    writer.flush()
    writer.close()
    events = list(tensorboard_events(tmp_path))
    assert tags(events, "simple_value") == [(3, "train/loss")]
    assert tags(events, "image") == [(3, "train/samples")]
    assert tags(events, "tensor") == [(3, "note/text_summary")]
    image = [v.image for e in events for v in e.summary.value if v.HasField("image")][0]
    assert (image.width, image.height) == (32, 12)
    assert list(tensorboard_events(tmp_path / "hparams"))


def test_tensorboard_is_told_from_where_a_resumed_run_goes_on(tmp_path):
    writer = tensorboard_writer(tmp_path, resume_step=20)
    writer.write_scalars(25, {"loss": 2.0})
    writer.close()
    starts = [e.step for e in tensorboard_events(tmp_path) if e.HasField("session_log")]
    assert starts == [21]  # TensorBoard drops what earlier files hold from this step on


def test_images_become_png_grids(tmp_path):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 4, 6, 3), np.uint8)
    image_writer(tmp_path).write_images(7, {"val/samples": images * 10})
    grid = np.asarray(Image.open(tmp_path / "val" / "samples_gs-000007.png"))
    assert grid.shape == (2 + 2 * (4 + 2), 2 + 4 * (6 + 2), 3)
    assert grid[2, 2 + 8, 0] == 10  # second image, first row
    assert grid[2 + 6, 2, 0] == 40  # fifth image, second row


def test_grey_images_become_grey_pngs(tmp_path):
    image_writer(tmp_path).write_images(1, {"x": np.full((1, 4, 4, 1), 9, np.uint8)})
    assert Image.open(tmp_path / "x_gs-000001.png").mode == "L"


def test_memory_and_multi():
    (a, in_a), (b, in_b) = memory_writer(), memory_writer()
    both = multi_writer(a, b)
    both.write_scalars(1, {"loss": 1.0})
    both.write_scalars(1, {"lr": 2.0})
    both.write_texts(2, {"t": "x"})
    both.write_hparams({"h": 1})
    both.flush()
    both.close()
    assert in_a == in_b
    assert in_a.scalars == {1: {"loss": 1.0, "lr": 2.0}}
    assert (in_a.texts, in_a.hparams) == ({2: {"t": "x"}}, {"h": 1})


def test_background_writer_does_not_wait_and_keeps_the_order():
    gate, seen = threading.Event(), []

    def slow(step, scalars):
        gate.wait(10)
        seen.append(step)

    writer = background_writer(Writer(write_scalars=slow))
    for step in range(5):
        writer.write_scalars(step, {})
    assert seen == []
    gate.set()
    writer.flush()
    assert seen == [0, 1, 2, 3, 4]
    writer.close()


def test_background_writer_takes_keywords_as_clu_does():
    inner, written = memory_writer()
    writer = background_writer(multi_writer(inner))
    writer.write_scalars(step=1, scalars={"loss": 1.0})
    writer.write_hparams(hparams={"a": 1})
    writer.close()
    assert (written.scalars, written.hparams) == ({1: {"loss": 1.0}}, {"a": 1})


@pytest.mark.parametrize("how", ["write", "flush", "close"])
def test_background_errors_are_raised(how):
    def full(step, scalars):
        raise OSError("No space left on device")

    writer = background_writer(Writer(write_scalars=full))
    with pytest.raises(OSError, match="No space left"):
        writer.write_scalars(1, {})
        if how == "write":
            time.sleep(0.2)
            writer.write_texts(1, {})
        else:
            getattr(writer, how)()


def test_background_close_closes_even_after_an_error():
    closed = []

    def full(step, scalars):
        raise OSError("No space left on device")

    writer = background_writer(Writer(write_scalars=full, close=lambda: closed.append(True)))
    with pytest.raises(OSError):
        writer.write_scalars(1, {})
        writer.close()
    if not closed:
        writer.close()
    assert closed


def test_open_writer_writes_everything(workdir):
    writer = open_writer(workdir)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {"train/samples": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()
    assert rows(workdir / "metrics.jsonl")[0]["loss"] == 1.0
    assert (workdir / "images/train/samples_gs-000001.png").is_file()
    assert list(workdir.glob("events.out.tfevents.*"))


def test_only_the_first_process_writes(workdir, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    writer = open_writer(workdir)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert not workdir.exists()
