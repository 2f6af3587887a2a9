"""Record a trace of a few steps for TensorBoard's or Perfetto's profile view."""

import os

import jax

from diffusion_jax.train.loop import Event, Hook, Stop


def profiler(directory: str | os.PathLike, *, first_step: int = 10, num_steps: int = 3) -> Hook:
    """Make the hook: trace steps first_step ... first_step + num_steps - 1 into a folder.

    Step 1 compiles and cannot be traced. A run resumed past first_step records nothing. Waiting for
    the last of these steps is the one place where a hook waits for the device on purpose.
    """
    if first_step < 2 or num_steps < 1:
        raise ValueError(
            f"first_step = {first_step} should be at least 2, num_steps = {num_steps} at least 1"
        )
    last_step = first_step + num_steps - 1
    running: list[bool] = []

    def finish(event: Event) -> None:
        jax.block_until_ready(event.metrics)
        jax.profiler.stop_trace()
        running.clear()

    def act(event: Event) -> None:
        if event.step == first_step - 1:
            jax.block_until_ready(event.metrics)  # else the trace begins in the middle of this step
            jax.profiler.start_trace(os.fspath(directory))
            running.append(True)
        elif running:
            finish(event)

    def end(event: Event, stop: Stop | None) -> None:
        if running:
            finish(event)

    return Hook(lambda step: step in (first_step - 1, last_step), act, end)
