"""XLA_FLAGS are added to where the program starts, and only what jaxlib is known to take."""

import os
import subprocess
import sys

import pytest

from diffusion_jax import cli
from diffusion_jax.devices import xla_flags
from diffusion_jax.devices.xla_flags import CONVOLUTIONS_BY_EIGEN, add_cpu_flags, eigen_convolves

YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.fixture
def start(monkeypatch):
    """Let a program seem to start: without jax, on a CPU, in a known version."""

    def start(flags="", version="0.12.0.1", platforms="cpu", plugin=False):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        monkeypatch.setattr(xla_flags.importlib.metadata, "version", lambda name: version)
        plugins = ["cuda"] if plugin else []
        monkeypatch.setattr(xla_flags.importlib.metadata, "entry_points", lambda group: plugins)
        monkeypatch.setattr(xla_flags.importlib.util, "find_spec", lambda name: None)
        monkeypatch.delitem(sys.modules, "jax")

    return start


@pytest.mark.parametrize("given", [{}, {"platforms": ""}, {"version": "0.12.7"}])
def test_a_cpu_gets_the_flag_behind_those_of_the_user(start, given):
    start("--xla_dump_to=x", **given)
    assert not eigen_convolves()
    assert add_cpu_flags() == CONVOLUTIONS_BY_EIGEN
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {CONVOLUTIONS_BY_EIGEN}"
    assert eigen_convolves()
    assert add_cpu_flags() is None


@pytest.mark.parametrize(
    "given",
    [
        {"version": "0.10.2"},
        {"version": "0.11.2"},
        {"version": "0.13.0"},
        {"version": "1.0.0"},
        {"platforms": "cuda,cpu"},
        {"platforms": "tpu"},
        {"platforms": "", "plugin": True},
        {"flags": f"{YNNPACK}=LIBRARY_FUSION_TYPE_DOT"},
    ],
)
def test_no_flag_for_other_devices_and_versions_or_over_the_users_own(start, given):
    start(**given)
    before = os.environ["XLA_FLAGS"]
    assert add_cpu_flags() is None
    assert os.environ["XLA_FLAGS"] == before and not eigen_convolves()


def test_no_flag_once_jax_may_have_started(start, monkeypatch):
    start()
    monkeypatch.setitem(sys.modules, "jax", object())
    assert add_cpu_flags() is None and os.environ["XLA_FLAGS"] == ""


def test_training_sets_it_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(cli, "add_cpu_flags", lambda: CONVOLUTIONS_BY_EIGEN)
    with caplog.at_level("INFO", "diffusion_jax"):
        assert cli.main(["plan", "--config=nowhere.py"]) == 2
        assert not caplog.messages
        assert cli.main(["--config=nowhere.py"]) == 2
    assert [message for message in caplog.messages if CONVOLUTIONS_BY_EIGEN in message]


def test_importing_the_package_leaves_the_environment_alone():
    code = (
        "import os; before = dict(os.environ)\n"
        "import diffusion_jax, diffusion_jax.cli, diffusion_jax.devices.xla_flags\n"
        "assert dict(os.environ) == before"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
