"""A call that draws, and reports each step to a function that can stop it."""

from collections.abc import Callable

import jax

from diffusion_jax.diffusion.samplers.driver import Samples
from diffusion_jax.diffusion.samplers.watching import watch

# (steps done, steps in all) -> False to stop.
OnStep = Callable[[int, int], bool | None]


class Stopped(Exception):
    """A call was stopped by its on_step."""


def draw_watched(
    draw: Callable[..., Samples], on_step: OnStep, number: int, rounds: int
) -> Samples:
    """Draw round `number` of several, as long as on_step does not return False."""
    stopped = False

    def watcher(done: int, total: int) -> bool:
        nonlocal stopped
        stopped = stopped or on_step(number * total + done, rounds * total) is False
        return not stopped

    with watch(watcher):
        samples = jax.block_until_ready(draw(watched=True))
    if stopped:
        raise Stopped("on_step stopped the call")
    return samples
