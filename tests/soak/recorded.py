"""launch.py, with a line per step in the file RECORD: its number and the records in its batch.

    RECORD=steps.jsonl python tests/soak/recorded.py --config=... --workdir=...

A step's line is written before the next step starts, unbuffered, so a killed process leaves them.
"""

import json
import os
import sys
from typing import Any

from diffusion_jax.cli import main
from diffusion_jax.train import loop


def record(file: int) -> loop.Hook:
    """Make the hook that notes the number of a step and the records in its batch."""

    def act(event: loop.Event) -> None:
        line = {"step": event.step, "ids": [int(i) for i in event.batch["index"]]}
        os.write(file, (json.dumps(line) + "\n").encode())

    return loop.Hook(lambda step: True, act)


def _recording(train: Any, file: int) -> Any:
    def recorded(state: Any, train_step: Any, batches: Any, hooks: Any, **options: Any) -> Any:
        return train(state, train_step, batches, [record(file), *hooks], **options)

    return recorded


if __name__ == "__main__":
    path = os.environ["RECORD"]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    loop.train = _recording(loop.train, descriptor)
    sys.exit(main(sys.argv[1:]))
