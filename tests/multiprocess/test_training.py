"""Two real processes on one machine, connected by Gloo, train what one process trains."""

import fcntl
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.train.checkpoints.reading import load_params, saved_steps
from diffusion_jax.train.writers import read_jsonl

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multiprocess")


def start(folder, *arguments, devices):
    environment = os.environ | {
        "TFDS_DATA_DIR": str(folder / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(folder, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = (f"--coordinator_address=localhost:{port}", "--num_processes=2")
    return [
        start(folder, *arguments, *common, f"--process_id={rank}", devices=2) for rank in range(2)
    ]


def finish(*processes):
    try:
        texts = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def training(workdir, steps=STEPS):
    return (
        "--config=configs/mnist.py:tiny", f"--workdir={workdir}",
        f"--config.train.num_steps={steps}", "--config.checkpoint.keep_last=9",
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(folder):
    workdir = folder / "one"
    ((code, _, errors),) = finish(start(folder, *training(workdir), devices=4))
    assert code == 0, errors
    return workdir


@pytest.fixture(scope="module")
def two(folder, one):
    workdir = folder / "two"
    found = finish(*start_two(folder, *training(workdir)))
    assert [code for code, _, _ in found] == [0, 0], found
    return workdir, found


def without_gloo(text):
    return [line for line in text.splitlines() if line.strip() and "[Gloo]" not in line]


def rows(workdir):
    """Metrics that do not depend on the clock, by step and name."""
    return {
        (row["step"], name): value
        for row in read_jsonl(workdir / "metrics.jsonl")
        for name, value in row.items()
        if name not in ("step", "time") and not name.startswith("perf/")
    }


def assert_same_rows(found, expected):
    assert found.keys() == expected.keys() and len(found) > 20
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-4, err_msg=str(key))


def test_two_processes_train_like_one(one, two):
    workdir, _ = two
    assert_same_rows(rows(workdir), rows(one))
    for ema in (False, True):
        params = [load_params(run / "checkpoints", step=STEPS, ema=ema) for run in (one, workdir)]
        for expected, found in zip(*map(leaves, params), strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-4)


def leaves(tree):
    children = tree.values() if isinstance(tree, dict) else ()
    return [leaf for child in children for leaf in leaves(child)] if children else [tree]


def test_process_0_alone_writes(one, two):
    workdir, ((_, said, _), (_, other, errors)) = two
    assert "mesh slices 1 x data 4" in said and "test split, 250 images" in said
    assert without_gloo(other) == [] and without_gloo(errors) == []
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    images = {path.relative_to(one) for path in one.glob("images/*/*.png")}
    assert images and images == {p.relative_to(workdir) for p in workdir.glob("images/*/*.png")}


def test_pictures_show_what_process_0_has(one, two):
    workdir, _ = two
    for name in ("inputs", "samples", "diffusion_row"):
        path = f"images/train/{name}_gs-000004.png"
        whole, half = (np.asarray(Image.open(run / path), int) for run in (one, workdir))
        assert half.size < whole.size  # four rows of the eight
        assert half.std() > 10
        difference = np.abs(half - whole[: half.shape[0], : half.shape[1]])
        assert np.median(difference) == 0


def test_one_process_goes_on_from_a_checkpoint_of_two(folder, two):
    workdir, _ = two
    expected = rows(workdir)
    ((code, said, errors),) = finish(
        start(folder, f"--resume={workdir / 'checkpoints/4'}", devices=2)
    )
    assert code == 0 and "continues at step 4" in said, errors
    assert_same_rows(rows(workdir), expected)


def test_all_processes_tell_of_damage_and_may_take_the_previous_checkpoint(folder, two):
    workdir = folder / "damaged"
    shutil.copytree(two[0], workdir)
    files = (workdir / "checkpoints/8/state").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    found = finish(*start_two(folder, f"--resume={workdir}"))
    assert [code for code, _, _ in found] == [2, 2], found
    for _, _, errors in found:
        assert "checkpoints/8 is damaged" in errors and "checkpoints/4; on_damage" in errors
    previous = (f"--resume={workdir}", "--config.checkpoint.on_damage=previous")
    found = finish(*start_two(folder, *previous))
    assert [code for code, _, _ in found] == [0, 0], found
    assert "continues at step 4" in found[0][1] and "which is used" in found[0][2]
    assert (workdir / "checkpoints/set_aside/8").is_dir()
    assert_same_rows(rows(workdir), rows(two[0]))


def test_a_signal_to_one_process_stops_both_at_one_step(folder):
    workdir = folder / "stopped"
    processes = start_two(folder, *training(workdir, steps=10_000))
    deadline = time.monotonic() + 300
    while not saved_steps(workdir / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    found = finish(*processes)
    assert [code for code, _, _ in found] == [75, 75], found
    last = saved_steps(workdir / "checkpoints")[-1]
    assert f"stopped at step {last}: SIGTERM" in found[0][1]
    assert without_gloo(found[1][1]) == []


def test_processes_with_different_configs_do_not_train_together(folder):
    workdir = folder / "different"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = (f"--coordinator_address=localhost:{port}", "--num_processes=2")
    found = finish(
        *(
            start(
                folder, *training(workdir), *common, f"--process_id={rank}",
                f"--config.optimizer.learning_rate={rate}", devices=2,
            )
            for rank, rate in enumerate(("1e-3", "2e-3"))
        )
    )  # fmt: skip
    message = "process 1 has config.optimizer.learning_rate = 0.002 (process 0: 0.001)"
    for code, _, errors in found:
        assert code == 2 and message in errors, found
    assert not workdir.exists()


def test_a_folder_in_use_is_told_once(folder):
    workdir = folder / "taken"
    workdir.mkdir()
    with (workdir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first, second = finish(*start_two(folder, *training(workdir)))
    assert [first[0], second[0]] == [2, 2]
    assert f"error: another process trains in {workdir}" in first[2]
    assert f"error: process 0 could not open {workdir}" in second[2]
