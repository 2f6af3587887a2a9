"""Options for XLA's compiler by the kind of device, which XLA_FLAGS overrules."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.devices.xla_flags import CONVOLUTIONS_BY_EIGEN
from diffusion_jax.train import compiler_options
from diffusion_jax.train.compiler_options import (
    kept_off_disk,
    onednn_convolves,
    options_for_gpus,
    options_for_what_runs_once,
)


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


@pytest.mark.parametrize(
    ("flags", "machine", "platform", "chosen"),
    [
        (CONVOLUTIONS_BY_EIGEN, "x86_64", "cpu", True),
        (CONVOLUTIONS_BY_EIGEN, "aarch64", "cpu", False),
        (CONVOLUTIONS_BY_EIGEN, "x86_64", "gpu", False),
        ("", "x86_64", "cpu", False),
        (
            f"{CONVOLUTIONS_BY_EIGEN} --xla_cpu_experimental_onednn_custom_call=false",
            "x86_64",
            "cpu",
            False,
        ),
    ],
)
def test_onednn_convolves_where_ynnpack_does_not_and_stays_off_disk(
    monkeypatch, flags, machine, platform, chosen
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(compiler_options.platform, "machine", lambda: machine)
    monkeypatch.setattr(compiler_options.sys, "platform", "linux")
    mesh = SimpleNamespace(devices=np.full(1, SimpleNamespace(platform=platform), object))
    assert onednn_convolves(mesh) == chosen
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    assert kept_off_disk(lambda: getattr(jax.config, name), mesh)() == (
        float("inf") if chosen else before
    )
    assert getattr(jax.config, name) == before
