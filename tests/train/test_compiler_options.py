"""Options for XLA's compiler by the kind of device, which XLA_FLAGS overrules."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.train.compiler_options import options_for_gpus, options_for_what_runs_once


def test_a_cpu_compiles_quickly_what_runs_once_unless_it_is_told_otherwise(monkeypatch):
    mesh = make_mesh()
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    assert options_for_what_runs_once(mesh) == {}
    monkeypatch.setenv("XLA_FLAGS", "")
    assert options_for_what_runs_once(mesh) == {"xla_backend_optimization_level": 1}


@pytest.mark.parametrize(
    ("platform", "shape", "flags", "chosen"),
    [
        ("gpu", {"data": 8, "fsdp": 1}, "", True),
        ("gpu", {"data": 2, "context": 4}, "--xla_gpu_autotune_level=0", True),
        ("gpu", {"data": 1, "fsdp": 1}, "", False),
        ("gpu", {"data": 2, "fsdp": 4}, "", False),
        ("gpu", {"data": 8}, "--xla_gpu_enable_latency_hiding_scheduler=true", False),
        ("tpu", {"data": 8}, "", False),
        ("cpu", {"data": 8}, "", False),
    ],
)
def test_gpus_hide_no_sum_of_gradients_unless_asked_to(monkeypatch, platform, shape, flags, chosen):
    monkeypatch.setenv("XLA_FLAGS", flags)
    size = int(np.prod(list(shape.values())))
    devices = np.full(size, SimpleNamespace(platform=platform), object)
    mesh = SimpleNamespace(size=size, shape=shape, devices=devices)
    options = {"xla_gpu_enable_analytical_sol_latency_estimator": False}
    assert options_for_gpus(mesh) == (options if chosen else None)
