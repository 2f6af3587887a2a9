"""Stop when a metric is no longer a number."""

import math

from diffusion_jax.train.checkpoint import Checkpoints
from diffusion_jax.train.hooks.late import Interval, late
from diffusion_jax.train.loop import Hook, Stop


def nan_stop(*, every: int = 100, checkpoints: Checkpoints | None = None) -> Hook:
    """Make the hook; it belongs before the checkpoint hook, whose last save it forbids.

    Every `every` steps it looks at all metrics since the last time. The Stop names the first step
    and metric that is NaN or infinite, and the newest checkpoint from before that step.
    """

    def check(interval: Interval) -> Stop | None:
        for step, metrics in zip(interval.steps, interval.metrics, strict=True):
            for name, value in metrics.items():
                if not math.isfinite(float(value)):
                    advice = _last_good(checkpoints, step)
                    return Stop(f"{name} is {float(value)} at step {step}{advice}", save=False)
        return None

    return late(check, every=every)


def _last_good(checkpoints: Checkpoints | None, step: int) -> str:
    if checkpoints is None:
        return ""
    earlier = [saved for saved in checkpoints.all_steps() if saved < step]
    if not earlier:
        return "; there is no checkpoint from before"
    return f"; the last checkpoint from before is {checkpoints.directory / str(earlier[-1])}"
