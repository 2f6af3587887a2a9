"""JAX may have most of a GPU's memory, as a plan says, unless the user has chosen."""

import os
import sys

import pytest

from diffusion_jax import cli
from diffusion_jax.devices import gpu_memory
from diffusion_jax.devices.chips import find_chip
from diffusion_jax.devices.gpu_memory import SHARE, ask_for_gpu_memory
from diffusion_jax.plan.gpu_targets import GPUS, usable_bytes

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.fixture
def start(monkeypatch):
    """Let a program seem to start on a GPU, without a share that was chosen."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is taken away again afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(gpu_memory, "computes_on_a_cpu", lambda: False)
    monkeypatch.delitem(sys.modules, "jax")


def test_a_gpu_gives_its_share_and_a_plan_leaves_room_within_it(start):
    assert ask_for_gpu_memory() == f"{NAMES[0]}={SHARE}"
    assert float(os.environ[NAMES[0]]) == SHARE and NAMES[1] not in os.environ
    for gpu in GPUS.values():
        chip = find_chip(gpu.name)
        assert chip is not None
        assert usable_bytes(chip) < SHARE * gpu.memory


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_the_user_stays(start, monkeypatch, name):
    monkeypatch.setenv(name, "0.5")
    assert ask_for_gpu_memory() is None
    assert [os.environ.get(other) for other in NAMES if other != name] == [None]


def test_nothing_changes_on_a_cpu_or_once_jax_has_started(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", object())
    assert ask_for_gpu_memory() is None
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(gpu_memory, "computes_on_a_cpu", lambda: True)
    assert ask_for_gpu_memory() is None and NAMES[0] not in os.environ


def test_every_command_asks_and_training_says_so(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(cli, "ask_for_gpu_memory", lambda: asked.append(1) or "X=0.95")
    with caplog.at_level("INFO", "diffusion_jax"):
        assert cli.main(["plan", "--config=nowhere.py"]) == 2
        assert asked and not caplog.messages
        assert cli.main(["--config=nowhere.py"]) == 2
    assert [message for message in caplog.messages if "X=0.95" in message]
