"""A call that draws and says how far it is, until it is told to stop."""

from collections.abc import Callable

import jax

from diffusion_jax.diffusion.samplers.driver import Samples
from diffusion_jax.diffusion.samplers.watching import watch

# (steps done, steps in all) -> False to stop.
OnStep = Callable[[int, int], bool | None]


class Stopped(Exception):
    """A call was stopped by its on_step."""


def draw_watched(
    draw: Callable[..., Samples], on_step: OnStep, steps: tuple[int, int], rounds: tuple[int, int]
) -> Samples:
    """Draw a round of several, of the steps [first, last), while on_step lets it."""
    (first, last), (number, count) = steps, rounds
    stopped = False

    def watcher(step: int) -> bool:
        nonlocal stopped
        done = number * (last - first) + step - first
        stopped = stopped or on_step(done, count * (last - first)) is False
        return not stopped

    with watch(watcher):
        samples = jax.block_until_ready(draw(watched=True))
    if stopped:
        raise Stopped("on_step stopped the call")
    return samples
