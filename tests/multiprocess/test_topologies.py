"""The same examples with the same noise in the same order, on any number of devices and
processes."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = pathlib.Path(__file__).parents[2]
STEPS, BATCH = 6, 8
# processes, devices of each, and what the config says of the mesh
TOPOLOGIES = {
    "2 devices": (1, 2, ()),
    "4 devices": (1, 4, ()),
    "8 devices": (1, 8, ()),
    "8 devices, fsdp 4": (1, 8, ("--config.mesh.fsdp=4",)),
    "2 processes": (2, 1, ()),
    "4 processes": (4, 1, ()),
    "4 processes of 2 devices": (4, 2, ()),
    "2 slices of 2 processes": (4, 1, ("--config.mesh.slices=2", "--config.mesh.fsdp=2")),
}


def run(folder, name, processes, devices, options=()):
    """Train; return what the samples of all steps were and the losses."""
    workdir, trace = folder / name / "run", folder / name / "trace"
    environment = os.environ | {
        "TFDS_DATA_DIR": str(folder / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=1 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "JAX_PLATFORMS": "cpu",
        "TRACE": str(trace),
    }
    command = [
        sys.executable, str(ROOT / "tests/multiprocess/traced.py"), "--no_test",
        "--config=configs/mnist.py:tiny", f"--workdir={workdir}",
        f"--config.train.num_steps={STEPS}", f"--config.train.batch_size={BATCH}",
        "--config.hooks.images.batch_frequency=1000", "--config.hooks.validation.every=1000",
        "--config.checkpoint.every=1000", "--config.checkpoint.keep_best=0", *options,
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator_address=localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [*command, address, f"--num_processes={processes}", f"--process_id={rank}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, said
    with np.load(trace / "steps.npz") as steps:
        found = dict(steps)
    parts = [np.load(trace / f"ids_{rank}.npy") for rank in range(processes)]
    assert {part.shape for part in parts} == {(STEPS, BATCH // processes)}
    return {**found, "ids": np.concatenate(parts, axis=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("topologies")


@pytest.fixture(scope="module")
def alone(folder):
    """One process with one device."""
    found = run(folder, "alone", 1, 1)
    assert found["t"].shape == (STEPS, BATCH) and len(np.unique(found["ids"])) == STEPS * BATCH
    assert len(np.unique(found["t"])) > STEPS * BATCH // 2
    assert np.unique(found["noise"][:, :, 0, 0], axis=None).size == STEPS * BATCH
    assert found["loss"].std() > 0
    return found


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_trains_on_the_same(folder, alone, name):
    found = run(folder, name, *TOPOLOGIES[name])
    for what in ("ids", "t", "x_start", "noise"):
        np.testing.assert_array_equal(found[what], alone[what], err_msg=what)
    difference = np.abs(found["loss"] / alone["loss"] - 1).max()
    print(f"{name}: losses within {difference:.1e}")
    assert difference < 1e-5
