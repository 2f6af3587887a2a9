"""The files for clusters, as far as a machine without one can tell."""

import math
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.experiment.config.files import load_config

ROOT = pathlib.Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
JOBSETS = {"jobset.yaml": "google.com/tpu", "jobset_gpu.yaml": "nvidia.com/gpu"}
BATCH = DEPLOY / "slurm.sbatch"


def commands_of_docs():
    """Every launch.py command of docs/pods.md, as a list of arguments."""
    text = (ROOT / "docs/pods.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    launched = [re.search(r"(launch\.py|slurm\.sbatch) (--.*)", line) for line in lines]
    return [found[2].rstrip('"& ').replace("$i", "0") for found in launched if found]


def check_command(arguments):
    parsed = parse_arguments(arguments)
    config = load_config(str(ROOT / parsed.config), parsed.overrides)
    assert "mesh" not in config or set(config.mesh) <= {"slices", "data", "fsdp", "tensor"}


@pytest.mark.parametrize("command", commands_of_docs())
def test_commands_of_the_document(command):
    check_command(shlex.split(command))


def test_the_document_has_every_way_and_its_files():
    text = (ROOT / "docs/pods.md").read_text()
    assert len(commands_of_docs()) >= 6
    for path in re.findall(r"(?:deploy|configs|tests)/[\w./]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    for flag in ("--worker=all", "sbatch", "kubectl apply", "pmap"):
        assert flag in text


def containers(name):
    (document,) = yaml.safe_load_all((DEPLOY / name).read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = document["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return document, job, pod, container


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets(name):
    document, job, pod, container = containers(name)
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0 and spec["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert JOBSETS[name] in container["resources"]["limits"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert container["command"] == ["python", "launch.py"]
    environment = {entry["name"] for entry in container["env"]} if "env" in container else set()
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= environment
    check_command([re.sub(r"\$\(\w+\)", "0", argument) for argument in container["args"]])


def test_tpu_pods_fill_their_slice():
    _, job, pod, container = containers("jobset.yaml")
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(side) for side in topology.split("x"))
    hosts = job["template"]["spec"]["completions"]
    assert chips == hosts * container["resources"]["limits"]["google.com/tpu"]


def test_gpu_pods_know_the_first_and_how_many():
    document, job, _, container = containers("jobset_gpu.yaml")
    arguments = parse_arguments([a.replace("$(PROCESS_ID)", "1") for a in container["args"]])
    name = document["metadata"]["name"]
    host, port = arguments.coordinator_address.split(":")
    assert host == f"{name}-{job['name']}-0-0.{name}"  # JobSet's names of pods
    assert {"containerPort": int(port)} in container["ports"]
    assert arguments.num_processes == job["template"]["spec"]["completions"]


def run_batch(tmp_path, *arguments, code=0):
    """Run the script with stand-ins for SLURM's programs, which write down their arguments."""
    for name, status in (("srun", code), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\necho {name} "$@" >> "{tmp_path}/calls"\nexit {status}\n')
        program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PYTHON": "python",
        "HTTPS_PROXY": "http://proxy",
    }
    done = subprocess.run(
        ["bash", str(BATCH), *arguments], env=environment, capture_output=True, text=True
    )
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_the_batch_script_starts_every_task_and_queues_again(tmp_path):
    subprocess.run(["bash", "-n", str(BATCH)], check=True)
    arguments = ("--config=configs/sdxl.py", "--workdir=/shared/a run")
    done, calls = run_batch(tmp_path, *arguments, code=75)
    assert done.returncode == 75, done.stderr
    srun = "srun --kill-on-bad-exit=0 python launch.py --config=configs/sdxl.py"
    assert calls == [f"{srun} --workdir=/shared/a run", "scontrol requeue 42"]


@pytest.mark.parametrize("code", [0, 2])
def test_the_batch_script_ends_with_the_code_of_the_run(tmp_path, code):
    done, calls = run_batch(tmp_path, "--config=x", "--workdir=y", code=code)
    assert done.returncode == code and len(calls) == 1


def test_the_batch_script_needs_a_folder(tmp_path):
    done, calls = run_batch(tmp_path, "--config=configs/sdxl.py")
    assert done.returncode == 2 and "usage: sbatch" in done.stderr and calls == []


def test_the_batch_script_asks_for_one_task_per_gpu():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", BATCH.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")  # to the tasks, not to this script (no "B:")
