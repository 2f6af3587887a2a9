"""Topologies by name; what is unknown is answered with what is known."""

import importlib.util

import jax
import pytest

from diffusion_jax.devices.chips import CHIPS, GIB, find_chip
from diffusion_jax.plan.topology import CUDA_PLUGINS, TPUS, find_topology


@pytest.fixture
def without_plugin(monkeypatch):
    find = importlib.util.find_spec
    none = lambda name: None if name in CUDA_PLUGINS else find(name)
    monkeypatch.setattr(importlib.util, "find_spec", none)


def test_fake_devices_stand_for_gpus_where_their_compiler_is_missing(without_plugin, caplog):
    topology = find_topology("h100:8")
    assert len(topology.devices) == 8 and topology.devices[0].platform == "cpu"
    assert topology.compiler == "cpu" and topology.chip is not None
    assert 74 * GIB < topology.memory < topology.chip.hbm == 80 * GIB
    assert len(find_topology("a100:2x4").devices) == 8
    assert "CPU devices stand for h100:8 and the CPU's compiler compiles" in caplog.text
    assert "[cuda]" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "devices"), [("h100:1", 1), ("a100:8", 8), ("b200:2x8", 16)])
def test_the_gpu_compiler_knows_gpus_that_are_not_here(name, devices):
    pytest.importorskip("jax_cuda13_plugin")
    topology = find_topology(name)
    assert topology.compiler == "gpu" and len(topology.devices) == devices
    assert topology.devices[0].platform == "gpu"
    assert find_chip(topology.devices[0].device_kind) == topology.chip


def test_cpu_devices_are_no_chip():
    topology = find_topology("cpu:3")
    assert (len(topology.devices), topology.chip, topology.memory) == (3, None, None)
    assert topology.compiler == "cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", r"'v9:2x2' is unknown; .*v5e: 1x1, 2x2.*v5p: 2x2x1.*h100.*cpu"),
        ("", "is unknown; choose a TPU slice"),
        ("v5p", "should be v5p: and 3 numbers, as in v5p:2x2x1; v5p has 2x2x1, 2x2x2"),
        ("v5p:4x4", "should be v5p: and 3 numbers"),
        ("v5e:2x2x1", "should be v5e: and 2 numbers, as in v5e:1x1; v5e has"),
        (
            "h100",
            "should be h100: and a number, such as h100:8, or nodes and GPUs of each, such as",
        ),
        ("l4:0x8", "should be l4: and a number, such as l4:8, or nodes"),
        ("cpu:0", "should be cpu: and a number"),
        ("cpu:9", r"9 devices are asked for and JAX was started with 8"),
    ],
)
def test_an_unknown_topology_is_answered_with_what_is_known(name, message):
    with pytest.raises(ValueError, match=message):
        find_topology(name)


def test_a_missing_compiler_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"the package libtpu: pip install .*\[tpu\]"):
        find_topology("v5p:2x2x1")


def test_every_kind_of_tpu_has_a_chip():
    chips = {chip.name: chip for chip in CHIPS}
    for name, tpu in TPUS.items():
        # The compiler keeps a little for itself, and the figures are those of one device.
        assert 0.95 < tpu.usable / chips[name].hbm < 1.01, name


@pytest.mark.parametrize("name", TPUS)
def test_slices_that_can_be_rented_are_slices_that_the_compiler_knows(name, capfd):
    pytest.importorskip("libtpu")
    shapes = TPUS[name].slices.split(", ")
    for shape in (shapes[0], shapes[1], shapes[-1]):
        topology = find_topology(f"{name}:{shape}")
        chips = 1
        for size in shape.split("x"):
            chips *= int(size)
        assert len(topology.devices) == chips * (2 if name in ("v3", "v7x") else 1)
        assert (
            topology.compiler == "tpu" and topology.chip is not None and topology.chip.name == name
        )
    assert capfd.readouterr().err == ""
    assert jax.default_backend() == "cpu"


def test_a_shape_that_is_no_slice_is_answered_with_those_that_are():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="'v5e:3x3' is no slice that libtpu knows; v5e has 1x1"):
        find_topology("v5e:3x3")
