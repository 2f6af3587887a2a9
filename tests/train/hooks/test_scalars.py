import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.train.hooks import scalars as module
from diffusion_jax.train.hooks.scalars import Speed, scalars
from diffusion_jax.train.loop import Hook, train


class State(NamedTuple):
    step: jax.Array


@jax.jit
def _step(state):
    step = state.step + 1
    return State(step), {"loss": step.astype(jnp.float32), "grad_norm": step * 2.0}


def run(hook, num_steps, pause=0.0):
    def batches():
        while True:
            time.sleep(pause)
            yield None

    train(State(jnp.int32(0)), lambda s, b: _step(s), batches(), [hook], num_steps=num_steps)


def test_rows_are_means_over_their_interval(memory_writer):
    writer, written = memory_writer()
    run(scalars(writer, every=4), 10)
    rows = written.scalars
    assert list(rows) == [4, 8, 10]
    assert [rows[n]["train/loss"] for n in rows] == [2.5, 6.5, 9.5]
    assert [rows[n]["train/grad_norm"] for n in rows] == [5.0, 13.0, 19.0]
    assert "lr" not in rows[4] and "perf/images_per_second" not in rows[4]


def test_learning_rate_is_that_of_the_last_step(memory_writer):
    writer, written = memory_writer()
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    run(scalars(writer, every=4, lr_at=schedule), 10)
    got = [row["lr"] for row in written.scalars.values()]
    np.testing.assert_allclose(got, [1 - 3 / 10, 1 - 7 / 10, 1 - 9 / 10], rtol=1e-6)


def test_plain_python_rates_do(memory_writer):
    writer, written = memory_writer()
    run(scalars(writer, every=2, lr_at=lambda step: 0.5), 2)
    assert written.scalars[2]["lr"] == 0.5


def test_speed_and_share_of_waiting(memory_writer):
    writer, written = memory_writer()
    speed = Speed(images=8, devices=4)
    run(scalars(writer, every=5, speed=speed), 15, pause=0.02)
    row = written.scalars[10]
    assert 5 < row["perf/steps_per_second"] < 50
    assert row["perf/images_per_second"] == pytest.approx(8 * row["perf/steps_per_second"])
    assert row["perf/images_per_second_per_device"] == row["perf/images_per_second"] / 4
    assert 0.5 < row["perf/data_wait"] <= 1.0
    assert "perf/mfu" not in row  # the peak is not known


def test_utilisation_is_what_the_model_needs_over_what_the_devices_can(memory_writer):
    # Chowdhery et al. 2022, appendix B: 2 steps a second of 30 TFLOP on 4 devices of 50 TFLOP/s.
    speed = Speed(images=8, devices=4, flops=30 * 10**12, peak_flops=4 * 50e12)
    assert speed.utilisation(2.0) == pytest.approx(0.3)
    writer, written = memory_writer()
    run(scalars(writer, every=5, speed=speed), 10)
    row = written.scalars[10]
    assert row["perf/mfu"] == pytest.approx(row["perf/steps_per_second"] * 0.15)


def test_percentiles_show_the_rare_slow_step(memory_writer):
    writer, written = memory_writer()

    def step(state, batch):
        time.sleep(0.2 if int(state.step) % 20 == 15 else 0.01)
        return State(np.int32(int(state.step) + 1)), {"loss": np.float32(0)}

    train(State(np.int32(0)), step, iter(int, 1), [scalars(writer, every=20)], num_steps=40)
    row = written.scalars[40]
    p50, p90, p99 = (row[f"perf/step_seconds_p{n}"] for n in (50, 90, 99))
    assert 0.01 <= p50 <= p90 < p99
    assert p99 > 0.15


def test_one_step_has_no_speed(memory_writer):
    writer, written = memory_writer()
    run(scalars(writer, every=5), 1)
    assert set(written.scalars[1]) == {"train/loss", "train/grad_norm"}


def test_the_last_row_is_written_although_the_training_failed(memory_writer):
    writer, written = memory_writer()

    def fail(event):
        if event.step == 6:
            raise RuntimeError("a disk died")

    hooks = [scalars(writer, every=4), Hook(lambda step: True, fail)]
    with pytest.raises(RuntimeError, match="a disk died"):
        train(State(jnp.int32(0)), lambda s, b: _step(s), iter(int, 1), hooks, num_steps=9)
    assert [(step, row["train/loss"]) for step, row in written.scalars.items()] == [
        (4, 2.5),
        (6, 5.5),
    ]


def test_nan_is_not_averaged_away(memory_writer):
    writer, written = memory_writer()

    def step(state, batch):
        loss = np.float32(np.nan) if int(state.step) == 1 else np.float32(1)
        return State(np.int32(int(state.step) + 1)), {"loss": loss}

    train(State(np.int32(0)), step, iter(int, 1), [scalars(writer, every=3)], num_steps=3)
    assert math.isnan(written.scalars[3]["train/loss"])


def test_memory_where_the_device_tells(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**31}

    assert module.memory_gib() == {}  # CPU does not tell
    monkeypatch.setattr(module.jax, "local_devices", lambda: [Device()])
    assert module.memory_gib() == {"perf/memory_gib": 1.0, "perf/memory_peak_gib": 2.0}
