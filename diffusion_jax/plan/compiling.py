"""Compile the train step of a config for devices that are not there, and measure it."""

import logging
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.interpreters import partial_eval

from diffusion_jax.devices.chips import GIB
from diffusion_jax.devices.flops import jaxpr_flops, kernel_flops
from diffusion_jax.devices.mesh import batch_shards
from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config.binding import value_of
from diffusion_jax.experiment.task import Training
from diffusion_jax.plan import hlo
from diffusion_jax.plan.count import Counts, count
from diffusion_jax.plan.floor import Work, floor
from diffusion_jax.plan.memory import Held, held_bytes, read_bytes
from diffusion_jax.plan.topology import Topology
from diffusion_jax.runs.arguments import arguments_of
from diffusion_jax.runs.measuring.speed import model_flops
from diffusion_jax.train.step import jit_train_step
from diffusion_jax.wording import counted

_log = logging.getLogger(__name__)


class DoesNotFit(ValueError):
    """A program needs more memory than a device has."""

    def __init__(self, message: str, needed: int, available: int, held: int = 0) -> None:
        """Keep the bytes: needed, available, and needed for any batch (held)."""
        super().__init__(message)
        self.needed, self.available, self.held = needed, available, held


class Plan(NamedTuple):
    """What a training step takes; bytes and counts are per device unless a name says otherwise.

    held: bytes between two steps, by arithmetic.
    unread: held bytes that the step does not read (the decoder of a first stage).
    arguments, temporaries, code, peak: bytes as the compiler has them, without the unread ones.
    model_flops, step_flops: FLOPs of one step on all devices, without and with what is computed
        again to save memory.
    kernel_flops: the part of step_flops in custom kernels.
    counts: of the compiled program without kernels, every loop as often as it runs.
    once: the same with every loop once, as in the compiler's estimate optimal_seconds.
    work: the operations and the least time of each (plan.floor); empty where CPU devices stand for
        a chip.
    seconds: how long building, tracing, lowering and compiling took.
    host_bytes: peak memory of this process.
    """

    topology: Topology
    mesh: Mapping[str, int]
    batch_size: int
    per_device_batch: float
    remat: Any
    held: Held
    unread: int
    arguments: int
    temporaries: int
    code: int
    peak: int
    model_flops: int
    step_flops: int
    kernel_flops: int
    counts: Counts
    once: Counts
    optimal_seconds: float | None
    work: Sequence[Work]
    seconds: Mapping[str, float]
    host_bytes: int

    @property
    def total(self) -> int:
        """Bytes that a device needs: the peak of the step, its code, and what it does not read."""
        return self.peak + self.code + self.unread

    @property
    def fits(self) -> bool | None:
        """Whether the device has the total; None where its memory is not known."""
        return None if self.topology.memory is None else self.total <= self.topology.memory


def build(
    config: ml_collections.ConfigDict, topology: Topology, per_device_batch: int | None
) -> Experiment:
    """Build the experiment on the devices of a topology, with per_device_batch samples on each."""
    if per_device_batch is None:
        return make_experiment(config, devices=topology.devices)
    config = config.copy_and_resolve_references()
    accumulate = value_of(Training, config.train.to_dict(), "accumulate")
    # The mesh decides how many parts a batch has; this batch divides by any number of them.
    config.train.batch_size = len(topology.devices) * accumulate
    shards = batch_shards(make_experiment(config, devices=topology.devices).mesh)
    config.train.batch_size = per_device_batch * shards
    return make_experiment(config, devices=topology.devices)


def with_remat(config: ml_collections.ConfigDict, remat: bool | str) -> ml_collections.ConfigDict:
    """Copy a config with another policy of what is computed again to save memory."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if "remat" in config.model:  # and perhaps of another type
            del config.model.remat
        config.model.remat = remat
    return config


def make_plan(
    config: ml_collections.ConfigDict, topology: Topology, per_device_batch: int | None = None
) -> Plan:
    """Compile the train step of a config and measure it, with progress in the log.

    Args:
        config: the config of a run.
        topology: the devices.
        per_device_batch: samples per device and step, in place of config.train.batch_size.

    Raises:
        DoesNotFit: the compiler finds no room, or what lies there between steps is too large.
        ValueError: the config is wrong for these devices, or the compiler itself fails.
    """
    clock = _Clock()
    built = build(config, topology, per_device_batch)
    arguments = arguments_of(built)
    held = held_bytes(arguments)
    clock.lap("build")
    _log.info("%s", _sizes(built, held))
    _check_held(held, topology)
    traced = jit_train_step(built.train_step, arguments[0]).trace(*arguments)
    clock.lap("trace")
    _, used = partial_eval.dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.out_avals))
    read = read_bytes(arguments, used)
    lowered = traced.lower()
    clock.lap("lower")
    model = model_flops(built)
    clock.lap("trace the model alone")
    compiled = _compile(lowered, topology, clock, sum(held))
    memory = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text())
    once = count(program, loops=False)
    kernels = kernel_flops(traced.jaxpr)
    chip = topology.chip if topology.compiler != "cpu" else None
    work = floor(program, chip, kernels / len(topology.devices)) if chip else []
    clock.lap("count")
    return Plan(
        topology=topology,
        mesh=dict(built.mesh.shape),
        batch_size=built.training.batch_size,
        per_device_batch=built.training.batch_size / batch_shards(built.mesh),
        remat=config.model.remat if "remat" in config.model else False,
        held=held,
        unread=sum(held) - read,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=_peak(memory, topology),
        model_flops=model,
        step_flops=jaxpr_flops(traced.jaxpr),
        kernel_flops=kernels,
        counts=count(program),
        once=once,
        optimal_seconds=_optimal_seconds(compiled, once, topology),
        work=work,
        seconds=clock.seconds,
        host_bytes=_peak_of_this_process(),
    )


def _optimal_seconds(compiled: Any, once: Counts, topology: Topology) -> float | None:
    """Read the compiler's estimate of a step whose loops run once; None except for TPUs."""
    if topology.clock is None:
        return None
    optimal = compiled.cost_analysis()["optimal_seconds"]
    # XLA subtracts a whole second for each operation whose time it does not know.
    return optimal + max(0, round(once.cycles / topology.clock - optimal))


def _peak(memory: Any, topology: Topology) -> int:
    """Read the peak with arguments and results, or for CPUs, which do not tell it, their sum."""
    if topology.compiler == "tpu":
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def _compile(lowered: Any, topology: Topology, clock: "_Clock", held: int) -> Any:
    _log.info(
        "compiling for %s by XLA's %s compiler (the largest models take a quarter of an hour)",
        topology.name,
        topology.compiler.upper(),
    )
    try:
        compiled = _tiled(lowered)
    except jax.errors.JaxRuntimeError as error:
        needed = _out_of_memory(str(error))
        if needed is None:
            first = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"XLA's {topology.compiler.upper()} compiler cannot compile the step for "
                f"{topology.name}: {first:.300}; this is a fault of the compiler, and another "
                "batch size, size of image or train.accumulate may go around it"
            ) from error
        _, available = needed
        raise DoesNotFit(
            f"the step needs {needed[0] / GIB:.2f} GiB per device and {topology.name} has "
            f"{available / GIB:.2f} GiB",
            *needed,
            held,
        ) from error
    clock.lap("compile")
    return compiled


# How XLA's GPU compiler says that a matrix product cannot be cut as it wanted to, and the option
# with which cuBLAS computes such products.
_NO_TILES = "Couldn't find output tile sizes"
_CUBLAS = {"xla_gpu_enable_triton_gemm": False}


def _tiled(lowered: Any) -> Any:
    """Compile; with cuBLAS for all matrix products where the compiler's own kernels fail.

    On a GPU, XLA compiles several tilings of a product, leaves out those that fail, and times
    cuBLAS beside the others. Where there is no GPU it takes the first, which may fail: the tokens
    of a prompt are 77, and no tile of a power of 2 ends where a second prompt begins.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _NO_TILES not in str(error):
            raise
    _log.info("compiling once more, with cuBLAS for matrix products: XLA found no tiles for one")
    return lowered.compile(compiler_options=_CUBLAS)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def _out_of_memory(message: str) -> tuple[int, int] | None:
    """Read the (needed, available) bytes in an error of the TPU compiler; None in other errors.

    The message is: ... memory required for HLO temporaries (19.15G) exceeds available HBM (15.75G).
    """
    found = re.search(
        r"required for [^(]*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        message,
    )
    if found is None:
        return None
    needed, unit, available, other = found.groups()
    return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[other])


def _check_held(held: Held, topology: Topology) -> None:
    if topology.memory is not None and sum(held) > topology.memory:
        raise DoesNotFit(
            "parameters, moments, average, frozen networks and batch alone are "
            f"{sum(held) / GIB:.2f} GiB per device and {topology.name} has "
            f"{topology.memory / GIB:.2f} GiB",
            sum(held),
            topology.memory,
            sum(held),
        )


def _sizes(built: Experiment, held: Held) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in built.mesh.shape.items() if size > 1)
    parts = ", ".join(f"{name} {value / GIB:.3g}" for name, value in held._asdict().items())
    return (
        f"{counted(built.mesh.size, 'device', 'devices')}{f' ({mesh})' if mesh else ''}, batch "
        f"{built.training.batch_size}; GiB held by each: {parts}"
    )


def _peak_of_this_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Clock:
    """The seconds of one stage after another, which it logs."""

    def __init__(self) -> None:
        """Start the first stage."""
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._start
        self._start = now
        if self.seconds[stage] >= 1:
            _log.info("%s: %.0f s", stage, self.seconds[stage])
