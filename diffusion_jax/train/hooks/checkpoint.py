"""Save a checkpoint every so many steps, at the end, and when a validation was among the best."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffusion_jax.train.checkpoints.saving import Checkpoints
from diffusion_jax.train.hooks.nan_stop import metrics_stop, params_stop
from diffusion_jax.train.hooks.validation import Scores
from diffusion_jax.train.loop import Event, Hook, Stop, check_every
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree

_log = logging.getLogger(__name__)


def checkpoint(
    checkpoints: Checkpoints,
    metadata: Mapping[str, Any],
    *,
    every: int,
    scores: Scores | None = None,
    writer: Writer | None = None,
) -> Hook:
    """Make the hook; it belongs behind validation, whose scores decide which checkpoints are best.

    A step with a metric or a parameter that is NaN or infinite is not saved, so that it never
    pushes out the last good checkpoint: act and end return a Stop instead. A save waits for the
    state anyway, so looking costs nothing. At the end the state is saved, unless a Stop says that
    it is not worth it.

    Args:
        checkpoints: where to save; ValueError when their monitor is not among the scores.
        metadata: what goes with every checkpoint (config, revision, seed). The hook adds
            next_batch, the number of the first batch that the state has not seen, and the scores.
        every: save at the multiples of this step.
        scores: filled by validation; a step whose score is among the best is saved too.
        writer: gets perf/checkpoint_stall, the seconds that a save during training kept the devices
            idle, from the end of the step until the hook returns.
    """
    check_every(every)
    scores = {} if scores is None else scores

    def best(event: Event) -> bool:
        return event.step in scores and checkpoints.is_best(scores[event.step])

    def save(event: Event, *, training: bool) -> Stop | None:
        metrics = jax.device_get(event.metrics)  # waits for the step
        done = time.perf_counter()
        bad = metrics_stop(event.step, metrics, checkpoints)
        bad = bad or params_stop(event.step, event.state.params, checkpoints)
        if bad is None:
            save_state(checkpoints, metadata, scores, event.step, event.state)
            if training:
                tell(event.step, time.perf_counter() - done)
        return bad

    def tell(step: int, stall: float) -> None:
        _log.info("checkpoint of step %d: training stood still for %.2f s", step, stall)
        if writer is not None:
            writer.write_scalars(step, {"perf/checkpoint_stall": stall})

    def act(event: Event) -> Stop | None:
        return save(event, training=True) if best(event) or event.step % every == 0 else None

    def end(event: Event, stop: Stop | None) -> Stop | None:
        if stop is not None and not stop.save:
            return None
        bad = save(event, training=False)
        if bad is None:
            best(event)  # raises if its monitor is missing, after the save
        return bad

    return Hook(lambda step: True, act, end)


def save_state(
    checkpoints: Checkpoints,
    metadata: Mapping[str, Any],
    scores: Scores,
    step: int,
    state: PyTree,
) -> None:
    """Save a state after `step` steps, with its place in the data and the scores so far."""
    position = {
        "next_batch": step,
        "scores": {str(known): dict(values) for known, values in scores.items()},
    }
    metrics = scores[step] if step in scores else None
    checkpoints.save(step, state, {**metadata, **position}, metrics)


def make_rescue(
    checkpoints: Checkpoints,
    metadata: Mapping[str, Any],
    scores: Scores | None = None,
    *,
    first_step: int | None = None,
) -> Callable[[PyTree], None]:
    """Make the function that saves an emergency checkpoint in loop.train and waits for it.

    first_step: the step that training started from, whose state is not saved again.
    The function raises RuntimeError when the state's buffers went with the step that failed, when a
    parameter is NaN or infinite, or when several processes train: saving takes all of them, and the
    others do not know of this one's error.
    """

    def rescue(state: PyTree) -> None:
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            raise RuntimeError("the state was given away to the step that failed")
        step = int(jax.device_get(state.step))
        if step == first_step:
            return
        if jax.process_count() > 1:
            raise RuntimeError("a single process cannot save a state that all of them share")
        bad = params_stop(step, state.params, checkpoints)
        if bad is not None:
            raise RuntimeError(bad.reason)
        save_state(checkpoints, metadata, {} if scores is None else scores, step, state)
        checkpoints.wait()
        _log.warning("an emergency checkpoint of step %d is saved; the same command goes on", step)

    return rescue
