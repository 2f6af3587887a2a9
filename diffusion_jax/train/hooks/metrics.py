"""Score samples of the model every so many steps, and say what that costs."""

import logging
import math
import time
from collections.abc import Callable, Mapping

import jax

from diffusion_jax.train.hooks.validation import KINDS, Scores
from diffusion_jax.train.loop import Event, Hook, Stop
from diffusion_jax.train.loop import every as every_steps
from diffusion_jax.train.writers import Writer
from diffusion_jax.types import PyTree

_log = logging.getLogger(__name__)
PREFIX = KINDS[1]
# The share of the time that metrics may take before they say so.
MAX_SHARE = 0.05


def metrics(
    score: Callable[[PyTree], Mapping[str, float]],
    writer: Writer,
    scores: Scores,
    *,
    every: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Hook:
    """Make the hook: score(state) -> {"mind_dinov2": 0.1, ...}, metrics of drawn samples.

    Results go to the writer and into scores[step] as "metrics/mind_dinov2" and so on, with
    metrics/time_share: the share of the time since training started that this hook took. Where it
    is above MAX_SHARE a warning says so, once. The first call, which compiles, counts only as long
    as there is no other. The last step is scored too, unless a Stop ended the training.
    """
    spent: list[float] = []
    began: list[float] = []
    done: set[int] = set()

    def act(event: Event) -> None:
        before = clock()
        with jax.transfer_guard("allow"):  # drawing is allowed to be careless, it waits anyway
            jax.block_until_ready(event.state)  # the wait for the step is not this hook's
            started = clock()
            found = {PREFIX + name: float(value) for name, value in score(event.state).items()}
        spent.append(clock() - started)
        share = _share(spent, clock() - began[0] if began else clock() - before)
        found[f"{PREFIX}time_share"] = share
        scores[event.step] = {**(scores[event.step] if event.step in scores else {}), **found}
        writer.write_scalars(event.step, found)
        done.add(event.step)
        if share > MAX_SHARE and len(spent) == 2:
            enough = math.ceil(every * share * (1 - MAX_SHARE) / (MAX_SHARE * (1 - share)))
            _log.warning(
                "metrics take %.0f %% of the time; config.hooks.metrics.every = %d would make it "
                "%.0f %%",
                100 * share,
                enough,
                100 * MAX_SHARE,
            )

    def start(step: int) -> None:
        del step
        began.append(clock())

    def end(event: Event, stop: Stop | None) -> None:
        if stop is None and event.step not in done:
            act(event)

    return Hook(every_steps(every), act, end, start)


def _share(spent: list[float], elapsed: float) -> float:
    """Compute the share of the time; calls after the first, which compiles, stand for it too."""
    usual = spent if len(spent) == 1 else spent[1:]
    typical = sum(usual) / len(usual)
    training = max(elapsed - sum(spent), 1e-9)
    return typical * len(spent) / (typical * len(spent) + training)
