"""Evaluate the state every so many steps and at the end; share the scores with other hooks."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax

from diffusion_jax.train.loop import Event, Hook, Stop
from diffusion_jax.train.loop import every as every_steps
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree

# {step: {metric: value}}; validation and metrics fill it, checkpoint and early_stopping read it.
Scores: TypeAlias = dict[int, dict[str, float]]
# How the names of scores begin, by where they come from.
KINDS = ("val/", "metrics/")


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
    done: set[int] = set()

    def act(event: Event) -> None:
        with jax.transfer_guard("allow"):  # evaluation is allowed to be careless, it waits anyway
            found = {name: float(value) for name, value in evaluate(event.state).items()}
        scores[event.step] = {**(scores[event.step] if event.step in scores else {}), **found}
        writer.write_scalars(event.step, found)
        done.add(event.step)

    def end(event: Event, stop: Stop | None) -> None:
        if stop is None and event.step not in done:
            act(event)

    return Hook(every_steps(every), act, end)


def is_due(found: Mapping[str, float], monitor: str) -> bool:
    """Tell whether the scores of a step should hold a monitor.

    Validation ("val/...") and metrics ("metrics/...") come at steps of their own; a step at which
    only the other one came says nothing of the monitor.
    """
    kind = "".join(monitor.partition("/")[:2])
    return kind not in KINDS or any(name.startswith(kind) for name in found)


def scores_from(metadata: Mapping[str, Any]) -> Scores:
    """Read the scores in the metadata of a checkpoint, so that a resumed run knows its best."""
    return {int(step): dict(values) for step, values in metadata["scores"].items()}
