"""Evaluate the state every so many steps and at the end; share the scores with other hooks."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from diffusion_jax.train.loop import Event, Hook, Stop
from diffusion_jax.train.loop import every as every_steps
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree

# {step: {metric: value}}; validation fills it, checkpoint and early_stopping read it.
Scores: TypeAlias = dict[int, dict[str, float]]


def validation(
    evaluate: Callable[[PyTree], Mapping[str, float]],
    writer: Writer,
    scores: Scores,
    *,
    every: int,
) -> Hook:
    """Make the hook: evaluate(state) -> {"val/loss_simple": 0.1, "val/loss_simple_ema": ...}.

    Results go to the writer and into scores[step]. The last step is validated too, unless a Stop
    ended the training.
    """

    def act(event: Event) -> None:
        with jax.transfer_guard("allow"):  # evaluation is allowed to be careless, it waits anyway
            found = {name: float(value) for name, value in evaluate(event.state).items()}
        scores[event.step] = found
        writer.write_scalars(event.step, found)

    def end(event: Event, stop: Stop | None) -> None:
        if stop is None and event.step not in scores:
            act(event)

    return Hook(every_steps(every), act, end)


def scores_from(metadata: Mapping[str, Any]) -> Scores:
    """Read the scores in the metadata of a checkpoint, so that a resumed run knows its best."""
    return {int(step): dict(values) for step, values in metadata["scores"].items()}
