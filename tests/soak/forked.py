"""Runs whose processes are forked from one that has imported everything and started no backend."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from recorded import record_steps

from diffusion_jax.cli import cache, main, train  # noqa: F401  both import what training needs

LOOK_SECONDS = 0.005


class Topology(NamedTuple):
    """Processes that train together, and how many devices each of them has."""

    processes: int
    devices: int


@contextlib.contextmanager
def exits_with(code: int) -> Iterator[None]:
    """End this (forked) process with the block, whatever happens."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run(NamedTuple):
    """A run folder and the command that starts or continues it; records lie beside the folder."""

    workdir: pathlib.Path
    arguments: tuple[str, ...]

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / "checkpoints"

    @property
    def log(self) -> pathlib.Path:
        return self.workdir.with_suffix(".log")

    def record(self, rank: int) -> pathlib.Path:
        return self.workdir.with_suffix(f".{rank}.jsonl")

    def start(self, on: Topology) -> list["Process"]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        return [Process(self._fork(on, rank, address)) for rank in range(on.processes)]

    def _fork(self, on: Topology, rank: int, address: str) -> int:
        if pid := os.fork():
            return pid
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if "device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={on.devices}")
        os.environ["XLA_FLAGS"] = " ".join(flags)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        place = (f"--coordinator_address={address}", f"--process_id={rank}")
        with exits_with(0):
            with record_steps(self.record(rank)):
                code = main(
                    [*self.arguments, f"--num_processes={on.processes}", *place]
                    if on.processes > 1
                    else self.arguments
                )
            sys.stdout.flush()
            os._exit(code)

    def recorded(self) -> int:
        """Tell how many bytes process 0 has recorded until now."""
        path = self.record(0)
        return path.stat().st_size if path.exists() else 0

    def steps(self, rank: int = 0, *, after: int = 0) -> list[dict[str, Any]]:
        """Read the lines after so many bytes that are whole."""
        path = self.record(rank)
        text = path.read_bytes()[after:] if path.exists() else b""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1:] == b"\n"]


class Process:
    """A forked process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None when it lives longer."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
