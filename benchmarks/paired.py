"""Time two programs against each other, each in its own process, in short alternating rounds.

What else runs on the machine slows both sides of a round alike, so the ratio of a round says more
than two times taken minutes apart. Standard library only: each side may live in another Python.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
# Parameter counts further apart than this are not the same network.
MAX_PARAMETER_GAP = 0.03


class Net(NamedTuple):
    """A network to compare: a config, what to change in it, and how many images a step takes."""

    config: str
    batch_size: int
    overrides: tuple[str, ...] = ()


NETS = {
    "demo": Net("configs/mnist.py", 32),
    # A plain DDPM UNet at full resolution: widths 32/64/64, two blocks a level, 28 px.
    "wide28": Net(
        "configs/mnist.py",
        32,
        (
            "--config.model.patch_size=1",
            "--config.model.channel_mult=(1,2,2)",
            "--config.model.num_res_blocks=2",
            "--config.model.conv_resample=True",
            "--config.model.use_scale_shift_norm=False",
        ),
    ),
    "cifar10": Net("configs/cifar10.py", 4),
    "tiny": Net("configs/mnist.py:tiny", 8),
}


class Round(NamedTuple):
    """Seconds of one unit of work (a training step, a batch of samples): on the clock, and of
    processors."""

    wall: float
    cpu: float


def parse(
    argv: list[str] | None, description: str, nets: str, table: dict[str, Net] = NETS
) -> argparse.Namespace:
    """Parse the options that the benchmarks share; --nets becomes a list of names of the table."""
    parser = argparse.ArgumentParser(description=description)
    flag = parser.add_argument
    flag("--nets", default=nets, help=f"comma-separated, of {', '.join(table)}")
    flag("--peer_python", default=sys.executable, help="a Python that has torch and diffusers")
    flag("--no_peer", action="store_true", help="time our side alone")
    flag("--peer_layout", default="channels_first", choices=["channels_first", "channels_last"])
    flag("--batch_size", type=int, help="default: the net's own")
    flag("--rounds", type=int, default=8, help="alternations")
    flag("--repeats", type=int, default=4, help="steps in a row on one side")
    flag("--threads", type=int, default=len(os.sched_getaffinity(0)))
    flag("--device", default="cpu", choices=["cpu", "gpu"])
    flag("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the activations")
    flag("--compile", action="store_true", help="torch.compile on the other side")
    flag("--peak_tflops", type=float, help="of the device at --dtype, for the MFU")
    arguments = parser.parse_args(argv)
    arguments.nets = arguments.nets.split(",")
    unknown = [name for name in arguments.nets if name not in table]
    if unknown:
        parser.error(f"--nets: {unknown[0]!r} is unknown; choose from {', '.join(table)}")
    for name in ("rounds", "repeats", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)} should be at least 1")
    return arguments


def check(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, least: dict[str, float]
) -> None:
    """End with one sentence for a number below its least, and for --out that exists."""
    for name, low in least.items():
        if getattr(arguments, name) < low:
            parser.error(f"--{name}={getattr(arguments, name)} should be at least {low}")
    if Path(arguments.out).exists():
        parser.error(f"--out={arguments.out} exists; choose a new folder")


def serve(build: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[int], None]]]) -> None:
    """Be one side: build the work from the first line of stdin, then run as many units as each
    further line says.

    build: specification -> (what to report about itself, run(units), which returns when the
    results exist). Answers are lines of JSON on stdout.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    specification = json.loads(sys.stdin.readline())
    # XLA has no option for its number of threads: it takes one for each core that it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: specification["threads"]])
    report, run = build(specification)
    answer(report)
    for line in sys.stdin:
        units = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        run(units)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answer({"wall": wall / units, "cpu": cpu / units, "memory": peak_memory()})


def first_call(work: Callable[[], Any]) -> tuple[Any, Round]:
    """Call twice -> what the second call returned, and how much longer the first one took."""
    seconds = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    (first, first_cpu), (again, again_cpu) = seconds
    return result, Round(first - again, first_cpu - again_cpu)


def peak_memory() -> int:
    """Bytes of main memory that this process held at most, so far (Linux counts in KiB)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Side:
    """One of the two programs, running in a process of its own."""

    def __init__(self, python: str, script: str, specification: dict[str, Any]) -> None:
        environment = dict(os.environ)
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is cached is not timed
        environment["PYTHONPATH"] = str(HERE.parent)
        environment["OMP_NUM_THREADS"] = str(specification["threads"])
        environment["JAX_PLATFORMS"] = "cpu" if specification["device"] == "cpu" else "cuda"
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs room as well
        environment["BENCHMARK_WORK"] = specification["work"] if "work" in specification else ""
        self.name = script
        self.process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.memory = 0
        self.rounds: list[Round] = []
        self.report = self._ask(specification)

    def round(self, units: int) -> Round:
        """Run some units of work; returns the seconds of one and remembers them."""
        answer = self._ask(units)
        self.memory = answer["memory"]
        self.rounds.append(Round(answer["wall"], answer["cpu"]))
        return self.rounds[-1]

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, value: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmarks/{self.name} ended without an answer; see its error")
        return json.loads(line)


def compare(name: str, arguments: argparse.Namespace, work: str) -> dict[str, Any]:
    """Time one network on both sides and print the comparison; returns the numbers.

    work: "train" or "sample". Raises ValueError when the sizes of the two networks differ.
    """
    specification = {
        **NETS[name]._asdict(),
        "work": work,
        "threads": arguments.threads,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "layout": arguments.peer_layout,
    }
    if arguments.batch_size:
        specification["batch_size"] = arguments.batch_size
    ours = Side(sys.executable, "side_jax.py", specification)
    sides = [ours]
    try:
        if not arguments.no_peer:
            torch_side = {**specification, "network": ours.report["network"]}
            sides.append(Side(arguments.peer_python, "side_torch.py", torch_side))
            same_size(*(side.report["parameters"] for side in sides))
        alternate(sides, arguments.rounds, arguments.repeats)
    finally:
        for side in sides:
            side.close()
    print(describe(name, arguments, specification, sides), flush=True)
    return {"ratio": ratios(*sides) if len(sides) == 2 else None, "ours": ours.rounds}


def alternate(sides: list[Side], rounds: int, repeats: int) -> None:
    """Let the sides take turns, and keep the rounds of this call only."""
    for side in sides:  # caches and allocators settle; not counted
        side.round(1)
        side.rounds.clear()
    for _ in range(rounds):
        for side in sides:
            side.round(repeats)


def same_size(ours: int, theirs: int) -> None:
    """Raise ValueError when two parameter counts are too far apart to be the same network."""
    if abs(ours - theirs) > MAX_PARAMETER_GAP * max(ours, theirs):
        raise ValueError(
            f"the networks differ: {ours:,} parameters here, {theirs:,} in PyTorch; "
            f"more than {MAX_PARAMETER_GAP:.0%} apart is no comparison"
        )


def ratios(ours: Side, theirs: Side) -> dict[str, float]:
    """How many times longer the other side takes: above 1, we are faster."""
    pairs = zip(theirs.rounds, ours.rounds, strict=True)
    paired = sorted(theirs.wall / ours.wall for theirs, ours in pairs)
    return {
        "median": statistics.median(paired),
        "lowest": paired[0],
        "highest": paired[-1],
        "least": min(r.wall for r in theirs.rounds) / min(r.wall for r in ours.rounds),
        "cpu": min(r.cpu for r in theirs.rounds) / min(r.cpu for r in ours.rounds),
    }


def describe(
    name: str, arguments: argparse.Namespace, specification: dict[str, Any], sides: list[Side]
) -> str:
    """The comparison as a table of plain text."""
    batch = specification["batch_size"]
    unit = "step" if specification["work"] == "train" else "batch"
    flops = sides[0].report["flops"]
    where = f"{arguments.threads} threads" if arguments.device == "cpu" else "GPU"
    rows = {
        "": lambda side, least: side.report["version"],
        "parameters": lambda side, least: f"{side.report['parameters']:,}",
        "ready in": lambda side, least: f"{side.report['ready']:.1f} s",
        f"{unit}, least": lambda side, least: f"{least:.4f} s",
        f"{unit}, median": lambda side, least: f"{statistics.median(_walls(side)):.4f} s",
        f"{unit}, CPU time": lambda side, least: f"{min(r.cpu for r in side.rounds):.4f} s",
        "images a second": lambda side, least: f"{batch / least:.1f}",
        "peak memory": lambda side, least: _mebibytes(side.memory),
        "  before it began": lambda side, least: _mebibytes(side.report["memory_at_start"]),
    }
    if arguments.device == "gpu":
        rows["device memory"] = lambda side, least: _mebibytes(side.report["device_memory"])
    if flops:
        rows["GFLOP a second"] = lambda side, least: f"{flops / least / 1e9:.0f}"
    if flops and arguments.peak_tflops:
        peak = arguments.peak_tflops * 1e12
        rows["MFU"] = lambda side, least: f"{flops / least / peak:.1%}"
    lines = [
        f"{name}: {specification['config']}, a {unit} of {batch} images, {where}, "
        f"{arguments.dtype}" + (f", {flops / 1e9:.2f} GFLOP" if flops else "")
    ]
    for title, cell in rows.items():
        cells = [cell(side, min(_walls(side))) for side in sides]
        lines.append(f"  {title:<20}" + "".join(f"{text:<20}" for text in cells).rstrip())
    if len(sides) == 2:
        r = ratios(*sides)
        lines.append(
            f"  PyTorch's time over ours: {r['median']:.2f} in the median of {arguments.rounds} "
            f"rounds ({r['lowest']:.2f} to {r['highest']:.2f}), {r['least']:.2f} by least times, "
            f"{r['cpu']:.2f} by CPU time (above 1, ours is faster)"
        )
    return "\n".join(lines)


def _walls(side: Side) -> list[float]:
    return [r.wall for r in side.rounds]


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
