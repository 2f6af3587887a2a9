"""Devices that are not there: a TPU slice as its compiler describes it, or CPU devices instead.

A topology is written KIND:SHAPE. For TPU slices (v5p:2x2x1) the TPU compiler in the package libtpu
compiles, for GPUs (h100:8, or h100:2x8 for two nodes of eight) the GPU compiler in jax's plugin for
CUDA. Without the plugin CPU devices stand for GPUs, as they do for cpu:8.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies

from diffusion_jax.devices.chips import CHIPS, GIB, Chip, find_chip
from diffusion_jax.plan.gpu_targets import target_config, usable_bytes

_log = logging.getLogger(__name__)

LIBTPU = "pip install 'jax[tpu]'"
CUDA_EXTRA = "pip install -c constraints.txt -e '.[cuda]'"
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


class TpuKind(NamedTuple):
    """How the compiler describes a kind of TPU.

    prefix, config: its names for the kind and for the layout of cores. usable: bytes that a program
    may have, seen with libtpu 0.0.51. clock: cycles/s, from peak FLOP/s and the size of the matrix
    units. slices: shapes that can be rented, the smallest and the largest among them.
    """

    prefix: str
    config: str
    usable: int
    clock: float
    slices: str


def _gib(count: float) -> int:
    return int(count * GIB)


_FLAT = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
_DEEP = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, 8x8x16, 8x16x16"
TPUS = {
    "v3": TpuKind("v3", "default", _gib(15.48), 0.94e9, "2x2, 4x4, 4x8, 8x8, 8x16, 16x16, 16x32"),
    "v4": TpuKind("v4", "megacore", _gib(30.75), 1.05e9, _DEEP + ", 12x16x16"),
    "v5e": TpuKind("v5e", "default", _gib(15.75), 1.5e9, _FLAT),
    "v5p": TpuKind("v5p", "megacore", _gib(95.73), 1.75e9, _DEEP + ", 16x16x24"),
    "v6e": TpuKind("v6e", "default", _gib(31.24), 1.75e9, _FLAT),
    "v7x": TpuKind("tpu7x", "default", _gib(94.74), 2.2e9, _DEEP + ", 8x16x16"),
}


class Topology(NamedTuple):
    """Devices to plan for.

    devices: what a mesh is made of. compiler: the one of XLA's that compiles for them. chip: what
    each of them stands for, None for a CPU. memory: bytes that a program may have on one, None if
    not known. clock: cycles/s of a TPU, else None.
    """

    name: str
    devices: Sequence[Any]
    compiler: Literal["tpu", "gpu", "cpu"]
    chip: Chip | None = None
    memory: int | None = None
    clock: float | None = None


def find_topology(name: str) -> Topology:
    """Make the devices of a topology such as v5p:2x2x1, h100:8 or cpu:8, and start JAX on the CPU.

    Raises:
        ValueError: the name is unknown, or JAX was started before with fewer CPU devices.
        ImportError: libtpu is missing, or the plugin for CUDA is of another version than jax.
    """
    kind, _, shape = name.partition(":")
    gpus = {chip.name: chip for chip in CHIPS if chip.capability is not None}
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing may ask for a chip that another program uses
    jax.config.update("jax_platforms", "cpu")
    if kind in TPUS:
        return _tpu(name, kind, shape)
    if kind in gpus:
        return _gpu(name, gpus[kind], shape)
    if kind == "cpu":
        if not re.fullmatch(r"[1-9]\d*", shape):
            raise ValueError(f"topology {name!r} should be cpu: and a number, such as cpu:8")
        return Topology(name, _fake(int(shape)), "cpu")
    raise ValueError(
        f"topology {name!r} is unknown; choose a TPU slice "
        f"({'; '.join(f'{k}: {t.slices}' for k, t in TPUS.items())}), as in v5p:2x2x1; GPUs "
        f"({', '.join(gpus)}) with a number, as in h100:8, or nodes and a number, as in h100:2x8; "
        "or cpu:8"
    )


def _gpu(name: str, chip: Chip, shape: str) -> Topology:
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if match is None:
        raise ValueError(
            f"topology {name!r} should be {chip.name}: and a number, such as {chip.name}:8, or "
            f"nodes and GPUs of each, such as {chip.name}:2x8"
        )
    nodes, each = int(match[1] or 1), int(match[2])
    memory = usable_bytes(chip)
    if not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS):
        _log.warning(
            "CPU devices stand for %s and the CPU's compiler compiles: temporaries will differ; "
            "%s installs the GPU's compiler (any Linux machine will do, no GPU is needed)",
            name,
            CUDA_EXTRA,
        )
        return Topology(name, _fake(nodes * each), "cpu", chip, memory)
    try:
        found = topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x{nodes}x{each}", target_config=target_config(chip)
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ImportError(
            f"topology {name!r} needs a plugin for CUDA that fits jax {jax.__version__}; "
            f"{CUDA_EXTRA} installs it ({reason})"
        ) from error
    return Topology(name, found.devices, "gpu", chip, memory)


def _fake(number: int) -> Sequence[Any]:
    """Make as many CPU devices as asked for."""
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:  # JAX has started: what it has must be enough
        pass
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise ValueError(
            f"{number} devices are asked for and JAX was started with {len(devices)}; unset "
            f"XLA_FLAGS = {os.environ['XLA_FLAGS'] if 'XLA_FLAGS' in os.environ else ''!r}"
        )
    return devices[:number]


def _tpu(name: str, kind: str, shape: str) -> Topology:
    tpu = TPUS[kind]
    known = f"{kind} has {tpu.slices}"
    example = tpu.slices.split(", ")[0]
    rank = example.count("x") + 1
    if not re.fullmatch(r"x".join([r"[1-9]\d*"] * rank), shape):
        raise ValueError(
            f"topology {name!r} should be {kind}: and {rank} numbers, as in {kind}:{example}; "
            f"{known}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"topology {name!r} needs the TPU compiler, the package libtpu: {LIBTPU} (any Linux "
            "machine will do, no TPU is needed)"
        )
    _calm_libtpu()
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{tpu.prefix}:{shape}",
            chip_config_name=tpu.config,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"topology {name!r} is no slice that libtpu knows; {known} ({reason})"
        ) from error
    chip = find_chip(found.devices[0].device_kind)
    assert chip is not None and chip.name == kind
    return Topology(name, found.devices, "tpu", chip, tpu.usable, tpu.clock)


def _calm_libtpu() -> None:
    """Keep libtpu from asking a cloud what machine this is, and from complaining without an answer.

    Another program may use a chip meanwhile, for which libtpu has a lock.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-4")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
