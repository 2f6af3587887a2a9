"""Write the mean metrics of every interval, the learning rate, the speed and the memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.train.hooks.late import Interval, late
from diffusion_jax.train.loop import Hook
from diffusion_jax.train.writers import Writer

PERCENTILES = (50, 90, 99)


class Speed(NamedTuple):
    """What turns steps a second into images a second and a utilisation.

    images: samples of a step. devices: how many work on it. flops: floating-point operations of a
    step. peak_flops: how many all devices could do in a second; None as flops where not known.
    """

    images: int
    devices: int
    flops: int | None = None
    peak_flops: float | None = None

    def utilisation(self, steps_per_second: float) -> float | None:
        """Compute the model FLOPs utilisation: needed FLOP/s over the devices' peak.

        Source: Chowdhery et al. 2022, "PaLM", appendix B.
        """
        if self.flops is None or self.peak_flops is None:
            return None
        return steps_per_second * self.flops / self.peak_flops


def scalars(
    writer: Writer,
    *,
    every: int = 100,
    lr_at: Callable[[int], Any] | None = None,
    speed: Speed | None = None,
    prefix: str = "train/",
) -> Hook:
    """Make the hook; the row of step n covers the steps since the row before.

    It holds the mean of each metric, under the prefix; lr, the learning rate of step n (lr_at
    counts from 0); and under perf/

    - steps_per_second; with a speed also images_per_second, the same per device, and mfu where the
      devices' peak is known: over the whole wall time, other hooks included;
    - step_seconds_p50, _p90 and _p99, see `late.Interval.gaps`;
    - data_wait, the share of the time spent waiting for batches;
    - memory_gib and memory_peak_gib of this process's first device, where it says so.
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
        writer.write_scalars(interval.steps[-1], row | _speed(interval, speed) | memory_gib())

    return late(write, every=every, attach=learning_rate)


def _speed(interval: Interval, speed: Speed | None) -> dict[str, float]:
    if interval.timed_steps == 0:
        return {}  # only the step that compiled
    rate = interval.timed_steps / interval.seconds
    # A wait for a batch may be counted in one interval and its time in the next.
    waited = min(1.0, interval.data_wait / interval.seconds)
    row = {"perf/steps_per_second": rate, "perf/data_wait": waited}
    if speed is not None:
        row["perf/images_per_second"] = rate * speed.images
        row["perf/images_per_second_per_device"] = rate * speed.images / speed.devices
        utilisation = speed.utilisation(rate)
        if utilisation is not None:
            row["perf/mfu"] = utilisation
    if interval.gaps:
        for percent in PERCENTILES:
            row[f"perf/step_seconds_p{percent}"] = float(np.percentile(interval.gaps, percent))
    return row


def memory_gib() -> dict[str, float]:
    """Tell the memory of the first device, used now and at most; {} where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return {}
    names = {"perf/memory_gib": "bytes_in_use", "perf/memory_peak_gib": "peak_bytes_in_use"}
    return {ours: stats[theirs] / 2**30 for ours, theirs in names.items() if theirs in stats}
