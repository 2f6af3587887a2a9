"""Write the mean metrics of every interval, the learning rate, the speed and the memory."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusion_jax.train.hooks.late import Interval, late
from diffusion_jax.train.loop import Hook
from diffusion_jax.train.writers import Writer


def scalars(
    writer: Writer,
    *,
    every: int = 100,
    lr_at: Callable[[int], Any] | None = None,
    batch_size: int | None = None,
    prefix: str = "train/",
) -> Hook:
    """Make the hook; the row of step n covers the steps since the row before.

    It holds the mean of each metric, under the prefix; lr, the rate that step n was made with
    (lr_at counts from 0); steps_per_second and, for a batch_size, images_per_second, over the whole
    wall time, other hooks included; data_wait, the share of that time spent waiting for batches;
    and, where the device tells, memory_gib and memory_peak_gib of this process's first device.
    """

    def learning_rate(step: int) -> Any:
        with jax.transfer_guard("allow"):  # optax schedules compute with Python numbers
            return lr_at(step - 1) if lr_at is not None else None

    def write(interval: Interval) -> None:
        row = {
            prefix + name: float(np.mean([float(metrics[name]) for metrics in interval.metrics]))
            for name in interval.metrics[0]
        }
        if interval.attached is not None:
            row["lr"] = float(interval.attached)
        writer.write_scalars(interval.steps[-1], row | _speed(interval, batch_size) | _memory())

    return late(write, every=every, attach=learning_rate)


def _speed(interval: Interval, batch_size: int | None) -> dict[str, float]:
    if interval.timed_steps == 0:
        return {}  # only the step that compiled
    rate = interval.timed_steps / interval.seconds
    images = {} if batch_size is None else {"images_per_second": rate * batch_size}
    waited = interval.data_wait / interval.seconds
    return {"steps_per_second": rate, **images, "data_wait": waited}


def _memory() -> dict[str, float]:
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return {}
    names = {"memory_gib": "bytes_in_use", "memory_peak_gib": "peak_bytes_in_use"}
    return {ours: stats[theirs] / 2**30 for ours, theirs in names.items() if theirs in stats}
