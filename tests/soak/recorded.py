"""Training that leaves a line per step in a file: its number and the records in its batch."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from diffusion_jax.train import loop


@contextlib.contextmanager
def record_steps(path: pathlib.Path) -> Iterator[None]:
    """Record the steps of all that is trained in the block.

    A step's line is written before the next step starts, unbuffered, so a killed process leaves
    them.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    train = loop.train

    def act(event: loop.Event) -> None:
        line = {"step": event.step, "ids": [int(i) for i in event.batch["index"]]}
        os.write(file, (json.dumps(line) + "\n").encode())

    def recorded(state: Any, train_step: Any, batches: Any, hooks: Any, **options: Any) -> Any:
        hook = loop.Hook(lambda step: True, act)
        return train(state, train_step, batches, [hook, *hooks], **options)

    loop.train = recorded
    try:
        yield
    finally:
        loop.train = train
        os.close(file)
