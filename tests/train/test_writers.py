import errno
import json
import math
import os
import resource
import struct
import threading
import time

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from diffusion_jax.train import writers
from diffusion_jax.train.writers import (
    Writer,
    background_writer,
    image_writer,
    jsonl_writer,
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


def masked_crc(data):
    """CRC-32C bit by bit, rotated and shifted as TensorFlow's record files have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def tensorboard_events(folder):
    """Read event files, oldest first: records of [length u64, crc u32, data, crc u32]."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length, crc = struct.unpack("<QI", data[:12])
            assert crc == masked_crc(data[:8])
            event, (crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length :][:4])
            assert crc == masked_crc(event)
            yield Event.FromString(event)
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
    writer.flush()
    writer.close()
    events = list(tensorboard_events(tmp_path))
    assert tags(events, "simple_value") == [(3, "train/loss")]
    assert tags(events, "image") == [(3, "train/samples")]
    assert tags(events, "tensor") == [(3, "note/text_summary")]
    image = [v.image for e in events for v in e.summary.value if v.HasField("image")][0]
    assert (image.width, image.height) == (32, 12)


def test_tensorboard_is_told_from_where_a_resumed_run_goes_on(tmp_path):
    writer = tensorboard_writer(tmp_path, resume_step=20)
    writer.write_scalars(25, {"loss": 2.0})
    writer.close()
    starts = [e.step for e in tensorboard_events(tmp_path) if e.HasField("session_log")]
    assert starts == [21]  # TensorBoard drops what earlier files hold from this step on


def test_tensorboard_shows_the_config_beside_the_monitored_metric(tmp_path):
    writer = tensorboard_writer(tmp_path, monitor="val/loss")
    writer.write_hparams({"seed": 3, "model.name": "unet", "model.mult": (1, 2), "x": None})
    writer.close()
    found = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    }
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    assert values["seed"].number_value == 3 and values["model.name"].string_value == "unet"
    assert values["model.mult"].string_value == "(1, 2)" and values["x"].string_value == "None"
    experiment = found["_hparams_/experiment"].experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["val/loss"]


def test_texts_of_pictures_become_files_beside_them(tmp_path):
    texts = {"val/conditioning": "a fox\nb\n", "parameters": "not of pictures"}
    image_writer(tmp_path).write_texts(7, texts)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path == tmp_path / "val/conditioning_gs-000007.txt" and path.read_text() == "a fox\nb\n"


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


def test_all_writers_get_every_call(memory_writer):
    (a, in_a), (b, in_b) = memory_writer(), memory_writer()
    closed = []
    both = background_writer(a, b, Writer(close=lambda: closed.append(True)))
    both.write_scalars(1, {"loss": 1.0})
    both.write_scalars(1, {"lr": 2.0})
    both.write_texts(2, {"t": "x"})
    both.flush()
    assert not closed
    both.close()
    assert in_a == in_b and closed
    assert in_a.scalars == {1: {"loss": 1.0, "lr": 2.0}}
    assert in_a.texts == {2: {"t": "x"}}


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


def test_background_writer_takes_keywords_as_clu_does(memory_writer):
    inner, written = memory_writer()
    writer = background_writer(inner)
    writer.write_scalars(step=1, scalars={"loss": 1.0})
    writer.write_texts(step=1, texts={"a": "b"})
    writer.close()
    assert (written.scalars, written.texts) == ({1: {"loss": 1.0}}, {1: {"a": "b"}})


def full(step, values):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"file of step {step}")


def test_what_cannot_be_written_is_told_once_and_ends_nothing(memory_writer, caplog):
    inner, written = memory_writer()
    closed = []
    broken = Writer(full, full, close=lambda: closed.append(True))
    writer = background_writer(broken, inner)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"loss": 1.0})
        writer.write_images(step, {})
    writer.flush()
    writer.close()
    (message,) = caplog.messages
    assert "metrics are not written: No space left on device" in message and "step 1" in message
    assert set(written.scalars) == {1, 2, 3} and closed


@pytest.mark.parametrize("dies", [False, True])
def test_a_thread_that_hangs_or_dies_is_told_once_and_keeps_nobody(monkeypatch, caplog, dies):
    """As a dead disk does: the queue fills, and flush and close do not wait for ever."""
    monkeypatch.setattr(writers, "_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    gate = threading.Event()

    def stuck(step, scalars):
        if dies:
            raise MemoryError
        gate.wait(60)

    writer = background_writer(Writer(write_scalars=stuck))
    started = time.monotonic()
    for step in range(2 * writers.MAX_QUEUED):
        writer.write_scalars(step, {})
    writer.flush()
    writer.close()
    assert time.monotonic() - started < 5
    gate.set()
    (message,) = caplog.messages
    assert "does not answer; training goes on" in message


def no_space(run):
    """Call run() while no file may grow beyond 1 kB, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_that_does_not_fit_the_disk_leaves_nothing_of_itself(tmp_path):
    writer = jsonl_writer(tmp_path / "metrics.jsonl")
    writer.write_scalars(1, {"loss": 0.5})

    def fail():
        with pytest.raises(OSError, match="File too large"):
            writer.write_scalars(2, {f"metric {i}": 0.0 for i in range(100)})

    no_space(fail)
    writer.write_scalars(3, {"loss": 0.25})
    writer.close()
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 3]


def test_a_file_that_is_gone_goes_on_in_a_new_one_and_that_is_told_once(tmp_path, caplog):
    path = tmp_path / "run/metrics.jsonl"
    writer = jsonl_writer(path)
    writer.write_scalars(1, {})
    path.parent.rename(tmp_path / "moved")
    for step in (2, 3):
        writer.write_scalars(step, {})
    (message,) = caplog.messages
    assert message == f"{path} is gone: it goes on in a new file"
    path.unlink()
    path.mkdir()
    for step in (4, 5):
        with pytest.raises(IsADirectoryError):
            writer.write_scalars(step, {})
    path.rmdir()
    writer.write_scalars(6, {})
    writer.close()
    assert [row["step"] for row in read_jsonl(path)] == [6]
    assert [row["step"] for row in read_jsonl(tmp_path / "moved/metrics.jsonl")] == [1]


def test_events_and_pictures_that_do_not_fit_the_disk_leave_nothing_of_themselves(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    events, images = tensorboard_writer(tmp_path), image_writer(tmp_path)
    events.write_scalars(1, {"loss": 0.5})
    images.write_images(1, {"x": np.zeros((1, 4, 4, 3), np.uint8)})

    def fail():
        for writer in (events, images):
            with pytest.raises(OSError, match="File too large"):
                writer.write_images(1, {"x": noise})

    no_space(fail)
    events.write_scalars(3, {"loss": 0.5})
    events.close()
    assert tags(tensorboard_events(tmp_path), "simple_value") == [(1, "loss"), (3, "loss")]
    assert [path.name for path in tmp_path.glob("*x_gs*")] == ["x_gs-000001.png"]
    assert Image.open(tmp_path / "x_gs-000001.png").size == (4, 4)


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b'{"step": "x"}', b"\0\0\0", b"[]", b'{"step": Infinity}', b'{"step": 1, "a": '],
)
def test_rows_that_are_none_are_named_unless_they_were_cut_at_the_end(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2}\n' + line)
    assert read_jsonl(path) == [{"step": 1, "a": 2}]
    path.write_bytes(b'{"step": 1, "a": 2}\n' + line + b"\n")
    for read in (read_jsonl, jsonl_writer):
        with pytest.raises(ValueError, match="metrics.jsonl line 2 is not a row of metrics"):
            read(path)


def test_open_writer_writes_everything(workdir):
    more = []
    writer = open_writer(workdir, Writer(write_scalars=lambda *given: more.append(given)))
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {"train/samples": np.zeros((1, 4, 4, 3), np.uint8)})
    writer.close()
    assert rows(workdir / "metrics.jsonl")[0]["loss"] == 1.0
    assert (workdir / "images/train/samples_gs-000001.png").is_file()
    assert list(workdir.glob("events.out.tfevents.*"))
    assert more == [(1, {"loss": 1.0})]


def test_only_the_first_process_writes(workdir, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    writer = open_writer(workdir)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert not workdir.exists()
