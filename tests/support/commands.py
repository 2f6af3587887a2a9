"""The commands of `launch.py`, in this process or in one of their own, on few devices.

As a script it is `launch.py` on the first of this machine's devices:

    python tests/support/commands.py 2 --config=configs/mnist.py:tiny --workdir=runs/x
"""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def first_devices(count: int) -> Iterator[None]:
    """Let JAX tell of the first devices only. Their threads are still those of all devices."""
    import jax

    devices = jax.devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@contextlib.contextmanager
def shared_experiments() -> Iterator[None]:
    """Assemble one Experiment for each config and its devices, however many commands read it.

    Its functions are pure, so what JAX traced and compiled for the first command serves the next.
    """
    import jax

    import diffusion_jax.experiment as room

    made: dict[str, object] = {}
    original = room.assemble

    def assemble(sections: Mapping[str, Any], devices: Sequence[Any] | None) -> object:
        devices = jax.devices() if devices is None else list(devices)
        name = json.dumps([sections, [device.id for device in devices]], default=repr)
        if name not in made:
            made[name] = original(sections, devices)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "assemble", assemble)
        yield


def run(*arguments: object, devices: int = 2) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed to both streams.

    As in a process of its own, nobody looks at the use of random keys: that takes 5 s of a run.
    """
    import jax

    from diffusion_jax.cli import main

    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    log = logging.StreamHandler(said)  # main makes one only if pytest had none of its own
    log.setFormatter(logging.Formatter("%(message)s"))
    logging.root.addHandler(log)
    with contextlib.ExitStack() as stack:
        stack.callback(logging.root.removeHandler, log)
        stack.enter_context(first_devices(devices))
        stack.enter_context(jax.debug_key_reuse(False))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        code = main([str(argument) for argument in arguments])
    said.seek(0)
    return code, said.read()


def succeed(*arguments: object, devices: int = 2) -> str:
    """Run a command that has to succeed; return what it printed."""
    code, said = run(*arguments, devices=devices)
    assert code == 0, said
    return said


def start(*arguments: object, devices: int = 2) -> subprocess.Popen[str]:
    """Start the same command in a process of its own, which computes the same bit for bit."""
    return subprocess.Popen(
        [sys.executable, __file__, str(devices), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    from diffusion_jax.cli import main

    with first_devices(int(sys.argv[1])):
        sys.exit(main(sys.argv[2:]))
