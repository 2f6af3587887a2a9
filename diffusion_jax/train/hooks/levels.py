"""Look at the loss by noise level every so many steps, in files and on the terminal."""

import logging
from collections.abc import Callable, Mapping, Sequence

import jax

from diffusion_jax.train.loop import Event, Hook, Stop
from diffusion_jax.train.loop import every as every_steps
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree

_log = logging.getLogger(__name__)


def levels(
    evaluate: Callable[[PyTree], Mapping[str, float]],
    lines: Callable[[Mapping[str, float]], Sequence[str]],
    writer: Writer,
    *,
    every: int,
) -> Hook:
    """Make the hook: evaluate(state) -> scalars go to the writer, lines(scalars) to the log.

    The last step is looked at too, unless a Stop ended the training.
    """
    done: set[int] = set()

    def act(event: Event) -> None:
        with jax.transfer_guard("allow"):  # evaluation is allowed to be careless, it waits anyway
            found = dict(evaluate(event.state))
        writer.write_scalars(event.step, found)
        _log.info("step %d, loss by noise level:\n  %s", event.step, "\n  ".join(lines(found)))
        done.add(event.step)

    def end(event: Event, stop: Stop | None) -> None:
        if stop is None and event.step not in done:
            act(event)

    return Hook(every_steps(every), act, end)
