"""Stop when validation no longer improves."""

import math
from collections.abc import Mapping

from diffusion_jax.train.hooks.validation import Scores, is_due
from diffusion_jax.train.loop import Event, Hook, Stop

_SIGN = {"min": 1.0, "max": -1.0}


def early_stopping(
    scores: Scores,
    *,
    monitor: str,
    patience: int,
    mode: str = "min",
    min_delta: float = 0.0,
) -> Hook:
    """Make the hook; it belongs behind validation, which fills the scores.

    It stops when none of the last `patience` validations was better than the best score before them
    by more than min_delta. mode: the lowest ("min") or the highest ("max") score is best; NaN never
    is. The scores alone decide, so a resumed run stops where an uninterrupted one would, and a run
    that was stopped does not train again.
    Raises ValueError for bad options and when validation does not report the monitor.
    """
    if mode not in _SIGN:
        raise ValueError(f"mode = {mode!r} is unknown; choose from {', '.join(_SIGN)}")
    if patience < 1:
        raise ValueError(f"patience = {patience} should be at least 1")
    if not min_delta >= 0:
        raise ValueError(f"min_delta = {min_delta} should be at least 0")

    def judge(last_step: int) -> Stop | None:
        steps = sorted(s for s in scores if s <= last_step and is_due(scores[s], monitor))
        if not steps:
            return None
        values = [_SIGN[mode] * _value(scores[step], monitor) for step in steps]
        best = _last_improvement(values, min_delta)
        if len(values) - 1 - best < patience:
            return None
        return Stop(
            f"{monitor} did not improve in {patience} validations on "
            f"{_SIGN[mode] * values[best]:.6g}, its value at step {steps[best]}"
        )

    def act(event: Event) -> Stop | None:
        return judge(event.step) if event.step in scores else None

    return Hook(lambda step: True, act, start=judge)


def _value(found: Mapping[str, float], monitor: str) -> float:
    if monitor not in found:
        raise ValueError(
            f"early stopping watches {monitor!r}, which validation does not report; "
            f"it reports {', '.join(sorted(found))}"
        )
    return found[monitor]


def _last_improvement(values: list[float], min_delta: float) -> int:
    best, at = math.inf, 0
    for i, value in enumerate(values):
        if value < best - min_delta:  # false for NaN
            best, at = value, i
    return at
