"""Record a trace of a few steps for TensorBoard's or Perfetto's profile view."""

import os

import jax

from diffusion_jax.train.loop import Event, Hook, Stop


def profiler(directory: str | os.PathLike, *, first_step: int = 10, num_steps: int = 3) -> Hook:
    """Make the hook: trace steps first_step ... first_step + num_steps - 1 into a folder.

    Step 1 compiles and cannot be traced. A run resumed past first_step records nothing. The hook
    waits for the device before the first and after the last of these steps.
    """
    if first_step < 2:
        raise ValueError(f"first_step = {first_step} should be at least 2")
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps} should be at least 1")
    last_step = first_step + num_steps - 1
    running = False

    def finish(event: Event) -> None:
        nonlocal running
        jax.block_until_ready(event.metrics)
        jax.profiler.stop_trace()
        running = False

    def act(event: Event) -> None:
        nonlocal running
        if event.step == first_step - 1:
            jax.block_until_ready(event.metrics)  # else the trace begins in the middle of this step
            jax.profiler.start_trace(os.fspath(directory))
            running = True
        elif running:
            finish(event)

    def end(event: Event, stop: Stop | None) -> None:
        if running:
            finish(event)

    return Hook(lambda step: step in (first_step - 1, last_step), act, end)
