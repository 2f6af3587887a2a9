"""Freed memory stays with a program that trains on a CPU, and only there."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from diffusion_jax import cli
from diffusion_jax.devices import host_memory
from diffusion_jax.devices.host_memory import keep_freed_memory

# Page faults of getting, writing and freeing 64 MiB ten times, once the first time is over.
FAULTS = """
import ctypes, resource, sys, threading
from diffusion_jax.devices.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use():
    block = libc.malloc(ctypes.c_size_t(2**26))
    ctypes.memset(block, 1, 2**26)
    libc.free(ctypes.c_void_p(block))
def some():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        use()
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
some()
thread = threading.Thread(target=some)  # as the threads of XLA
thread.start()
thread.join()
"""


def faults(keep):
    untuned = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", FAULTS, keep],
        env=untuned | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    return {kept for kept, _ in rows}, [int(count) for _, count in rows]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_block_that_was_freed_is_used_again_in_every_thread():
    kept, counts = faults("keep")
    assert kept == {"True"} and max(counts) < 100
    kept, counts = faults("no")
    assert kept == {"False"} and min(counts) > 10 * 2**26 // 2**21  # pages of at most 2 MiB


@pytest.fixture
def start(monkeypatch):
    """Let a program seem to start on a CPU, with nothing tuned and another C library."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(host_memory, "computes_on_a_cpu", lambda: True)
    monkeypatch.delitem(sys.modules, "jax")
    calls = []
    library = SimpleNamespace(mallopt=lambda name, value: calls.append(name) or 1)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: library)
    return calls


def test_a_program_on_a_cpu_keeps_it(start):
    assert keep_freed_memory() and len(start) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", ""), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")]
)
def test_what_the_user_tuned_stays(start, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory() and not start


def test_nothing_changes_elsewhere_or_once_jax_has_started(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", object())
    assert not keep_freed_memory()
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(host_memory, "computes_on_a_cpu", lambda: False)
    assert not keep_freed_memory() and not start
    monkeypatch.setattr(host_memory, "computes_on_a_cpu", lambda: True)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()


def test_training_keeps_it_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: True)
    with caplog.at_level("INFO", "diffusion_jax"):
        assert cli.main(["plan", "--config=nowhere.py"]) == 2
        assert not caplog.messages
        assert cli.main(["--config=nowhere.py"]) == 2
    assert [message for message in caplog.messages if "MALLOC_ARENA_MAX" in message]
