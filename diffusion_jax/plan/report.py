"""A plan as text and as a dictionary for JSON, and what to do if it does not fit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from diffusion_jax.devices.chips import GIB
from diffusion_jax.plan.compiling import Plan
from diffusion_jax.plan.count import Counts, linked_bytes
from diffusion_jax.plan.floor import Work, by_kind
from diffusion_jax.plan.search import Found
from diffusion_jax.plan.topology import TPUS, Topology
from diffusion_jax.wording import counted

LONGEST = 10  # operations that are listed one by one


def in_full(optimal_seconds: float | None, counts: Counts, once: Counts) -> float | None:
    """Scale the compiler's estimate, in which loops run once, to loops as often as they run.

    It grows like the cycles that the compiler expects; None where it expects none.
    """
    if optimal_seconds is None or not once.cycles:
        return None
    return optimal_seconds * counts.cycles / once.cycles


def estimated_seconds(plan: Plan) -> float | None:
    """Estimate a step: the compiler's time, and for kernels their FLOPs at the chip's peak."""
    seconds, chip = in_full(plan.optimal_seconds, plan.counts, plan.once), plan.topology.chip
    if seconds is None or chip is None:
        return None
    return seconds + _each(plan, plan.kernel_flops) / chip.peak_flops


def _each(plan: Plan, count: int) -> float:
    return count / len(plan.topology.devices)


def cycle_seconds(plan: Plan) -> float | None:
    """Convert the cycles of all operations, one after another, to seconds."""
    return plan.counts.cycles / plan.topology.clock if plan.topology.clock else None


def peak_seconds(plan: Plan) -> float | None:
    """Compute the time of the model's FLOPs alone at the peak of the chips."""
    chip = plan.topology.chip
    return _each(plan, plan.model_flops) / chip.peak_flops if chip else None


def floor_seconds(plan: Plan) -> float | None:
    """Sum the least times of all operations (plan.floor); None where the chip did not compile."""
    return sum(w.seconds for w in plan.work) if plan.work else None


def link_seconds(plan: Plan) -> float | None:
    """Compute the least time of the collectives, with all links of a device at full speed."""
    chip = plan.topology.chip
    if chip is None:
        return None
    return linked_bytes(plan.counts) / chip.interconnect


def as_dict(plan: Plan) -> dict[str, Any]:
    """List the figures of a plan, per device unless a name says otherwise, for JSON."""
    seconds, peak, floor = estimated_seconds(plan), peak_seconds(plan), floor_seconds(plan)
    counts = plan.counts
    return {
        "topology": plan.topology.name,
        "chip": plan.topology.chip._asdict() if plan.topology.chip else None,
        "devices": len(plan.topology.devices),
        "mesh": dict(plan.mesh),
        "batch_size": plan.batch_size,
        "per_device_batch": plan.per_device_batch,
        "remat": plan.remat,
        "bytes": {
            **plan.held._asdict(),
            "unread": plan.unread,
            "arguments": plan.arguments,
            "padding": _padding(plan),
            "temporaries": plan.temporaries,
            "code": plan.code,
            "peak": plan.peak,
            "total": plan.total,
            "available": plan.topology.memory,
        },
        "fits": plan.fits,
        "compiler": plan.topology.compiler,
        "flops": {
            "model_all_devices": plan.model_flops,
            "step_all_devices": plan.step_flops,
            "step": _each(plan, plan.step_flops),
            "kernels": _each(plan, plan.kernel_flops),
            "compiled_without_kernels": counts.flops,
            "compiled_loops_once": plan.once.flops,
            "kernels_that_run": counts.kernels,
            "loops_of_unknown_length": counts.unknown_loops,
        },
        "estimate_seconds": {
            "optimal": in_full(plan.optimal_seconds, counts, plan.once),
            "optimal_and_kernels_at_peak": seconds,
            "optimal_loops_once": plan.optimal_seconds,
            "cycles": cycle_seconds(plan),
            "floor": floor_seconds(plan),
            "model_flops_at_peak": peak,
            "collectives_on_links": link_seconds(plan),
        },
        "mfu": peak / seconds if seconds and peak else None,
        "mfu_at_floor": peak / floor if floor and peak else None,
        "floor": {kind: _figures(w) for kind, w in by_kind(plan.work).items()},
        "longest": [{"name": w.name, "kind": w.kind, **_figures(w)} for w in plan.work[:LONGEST]],
        "collectives": {
            kind: {"count": counts.collectives[kind], "bytes": counts.collective_bytes[kind]}
            for kind in sorted(counts.collectives)
        },
        "seconds": dict(plan.seconds),
        "host_bytes": plan.host_bytes,
    }


def _padding(plan: Plan) -> int:
    """Count the bytes that the compiler's layouts add to the arguments."""
    return plan.arguments - (sum(plan.held) - plan.unread)


def as_text(plan: Plan) -> str:
    """Write a plan for a person."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_work(plan), "", *_tail(plan)])


def _head(plan: Plan) -> Iterator[str]:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    number = len(plan.topology.devices)
    yield (
        f"{plan.topology.name}: {counted(number, 'device', 'devices')}"
        f"{f' ({axes})' if axes else ''}, batch {plan.batch_size}, {plan.per_device_batch:g} per "
        f"device, remat {plan.remat}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    held, available = plan.held, plan.topology.memory
    foreign = "  (the CPU compiler's, not the chip's)" if plan.topology.compiler == "cpu" else ""
    rows = [
        ("parameters", held.parameters, ""),
        ("moments", held.moments, ""),
        ("average", held.ema, ""),
        ("counters, statistics", held.other, ""),
        ("frozen, constants", held.frozen, ""),
        ("batch", held.batch, ""),
        ("held between steps", sum(held), f"  ({_size(plan.unread)} of it not read by the step)"),
        ("arguments", plan.arguments, f"  ({_size(_padding(plan))} of it padding)"),
        ("temporaries", plan.temporaries, foreign),
        ("code", plan.code, ""),
        ("peak with code", plan.total, _verdict(plan) if available else ""),
    ]
    yield "memory per device"
    for name, value, note in rows:
        yield f"  {name:<22}{_size(value):>12}{note}"


def _verdict(plan: Plan) -> str:
    assert plan.topology.memory is not None
    share = 100 * plan.total / plan.topology.memory
    verb = "fits" if plan.fits else "does not fit"
    return f"  of {_size(plan.topology.memory)} ({share:.0f} %): {verb}"


def _work(plan: Plan) -> Iterator[str]:
    counts, step = plan.counts, _each(plan, plan.step_flops)
    kernels = _each(plan, plan.kernel_flops)
    compiled = counts.flops + kernels
    yield "FLOPs of matrix products and convolutions"
    yield f"  {'model, a step':<22}{_flops(plan.model_flops):>12}  on all devices"
    yield f"  {'model, per device':<22}{_flops(_each(plan, plan.model_flops)):>12}"
    if plan.step_flops != plan.model_flops:
        yield f"  {'and what comes again':<22}{_flops(step):>12}  remat, backward passes of kernels"
    more = f"  ({100 * (compiled / step - 1):+.1f} % beside the count by arithmetic)"
    yield f"  {'compiled':<22}{_flops(compiled):>12}{more if step else ''}"
    if counts.kernels:
        yield f"  {'in kernels':<22}{_flops(kernels):>12}  by arithmetic; {counts.kernels} run"
    if counts.unknown_loops:
        yield f"  {counts.unknown_loops:g} loops count once: their length is not known"
    yield from _time(plan)
    yield from _floor(plan)


def _time(plan: Plan) -> Iterator[str]:
    seconds, peak, links = estimated_seconds(plan), peak_seconds(plan), link_seconds(plan)
    if peak is None:
        return
    yield ""
    yield "time of a step"
    if seconds is not None:
        speed = plan.batch_size / seconds
        yield (
            f"  {'estimate':<22}{seconds:>10.4g} s  the compiler's, loops in full: {speed:.4g} "
            f"samples/s, MFU {100 * peak / seconds:.1f} %"
        )
        yield f"  {'cycles':<22}{cycle_seconds(plan):>10.4g} s  of all operations one by one"
    floor = floor_seconds(plan)
    if floor is not None:
        speed = plan.batch_size / floor
        yield (
            f"  {'floor':<22}{floor:>10.4g} s  each operation at the peak of FLOPs or of memory: "
            f"at most {speed:.4g} samples/s, MFU {100 * peak / floor:.1f} %"
        )
    yield f"  {'model FLOPs at peak':<22}{peak:>10.4g} s"
    yield f"  {'collectives':<22}{links:>10.4g} s  at full speed of the links; overlaps, or adds"


def _floor(plan: Plan) -> Iterator[str]:
    if not plan.work:
        return
    yield ""
    yield f"{'floor by kind':<22}{'runs':>10}{'FLOPs':>12}{'bytes':>12}{'seconds':>12}"
    for kind, w in by_kind(plan.work).items():
        yield (
            f"  {kind:<20}{w.runs:>10}{_flops(w.flops):>12}{_size(w.bytes):>12}{w.seconds:>12.4g}"
        )
    yield f"the {LONGEST} operations that take longest"
    for w in plan.work[:LONGEST]:
        runs = f"{w.runs} x " if w.runs > 1 else ""
        yield f"  {w.seconds:>10.4g} s  {runs}{w.name} ({w.kind}), {w.place or 'no line known'}"


def _figures(w: Work) -> dict[str, Any]:
    return {"runs": w.runs, "flops": w.flops, "bytes": w.bytes, "seconds": w.seconds} | (
        {"place": w.place} if w.place else {}
    )


def _tail(plan: Plan) -> Iterator[str]:
    if plan.counts.collectives:
        yield "collectives per device and step"
    for kind in sorted(plan.counts.collectives):
        carried = _size(plan.counts.collective_bytes[kind])
        yield f"  {kind:<22}{carried:>12}  in {plan.counts.collectives[kind]:g}"
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in plan.seconds.items())
    yield f"{stages}; {_size(plan.host_bytes)} of host memory"


def table(found: Sequence[Found]) -> str:
    """Write what find_batches found, a line for each remat policy."""
    lines = [f"{'remat':<36}{'per device':>11}{'peak':>12}{'estimate':>11}{'samples/s':>11}"]
    for remat, batch, plan in found:
        seconds = estimated_seconds(plan) if plan else None
        lines.append(
            f"{remat!s:<36}{batch or 'none fits':>11}"
            + (f"{_size(plan.total):>12}" if plan else "")
            + (f"{seconds:>9.4f} s{plan.batch_size / seconds:>11.4g}" if plan and seconds else "")
        )
    return "\n".join(lines)


def advice(
    config: ml_collections.ConfigDict, topology: Topology, batch: int, needed: int, held: int
) -> str:
    """Say what to change in a plan that does not fit.

    batch: samples per device. needed: bytes that a step takes. held: the part of them that lies
    there between steps.
    """
    ideas, smaller = [], 0
    if topology.memory is not None and needed > held:
        smaller = int(batch * (topology.memory - held) / (needed - held))
    if smaller >= 1:
        ideas.append(f"--per_device_batch={smaller} (in proportion)")
    elif batch > 1:
        ideas.append("a smaller --per_device_batch")
    if "remat" not in config.model or config.model.remat not in (True, "full"):
        ideas.append("--config.model.remat=full")
    mesh = config.mesh if "mesh" in config else {}
    if len(topology.devices) > 1 and ("fsdp" not in mesh or mesh["fsdp"] != -1):
        ideas.append("--config.mesh.data=1 --config.mesh.fsdp=-1, which splits parameters")
    larger = _larger(topology)
    ideas.append(f"a larger slice with more fsdp, as {larger}" if larger else "more memory")
    return "try " + ", or ".join(ideas)


def _larger(topology: Topology) -> str | None:
    kind, _, shape = topology.name.partition(":")
    if kind not in TPUS:
        return f"{kind}:{2 * len(topology.devices)}"
    chips = lambda shape: math.prod(map(int, shape.split("x")))
    shapes = TPUS[kind].slices.split(", ")
    return next((f"{kind}:{s}" for s in shapes if chips(s) > chips(shape)), None)


def _size(value: int) -> str:
    return _scaled(value, {"GiB": GIB, "MiB": 2**20, "KiB": 2**10, "B": 1})


def _flops(value: int | float) -> str:
    return _scaled(value, {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "": 1})


def _scaled(value: int | float, units: Mapping[str, int | float]) -> str:
    for unit, size in units.items():
        if abs(value) >= size > 1:
            return f"{value / size:.2f} {unit}"
    return f"{value:g} {list(units)[-1]}".rstrip()
