"""Kill training processes again and again, and see that nothing is lost but time.

    python tests/soak/kill_and_resume.py --config=configs/mnist.py:tiny --kills=20
    python tests/soak/kill_and_resume.py --kills=50 --on=2x1 --counts=counts.json

One run is left alone. Another gets SIGKILL at random moments (--seed), every other time while a
checkpoint is being written (its folder still has its temporary name after the death), and is
started again with the same command. With several processes one of them is killed, and the others
have to end by themselves. Checked are

- at every start: the first step is the one after the newest finished checkpoint, and that is no
  older than the one that was finished before the kill; every step reads the records that the
  undisturbed run read in it;
- at the end: parameters, moments, EMA, mutable collections and the step are the same bits, the next
  batch is the same, and so are all logged metrics but those of the clock.

--on=2x1 trains in 2 processes of 1 device each; --on=1x1,1x2 changes the devices from start to
start (of one process), where sums round otherwise: numbers may then differ by ROUNDING, and bits
are not compared.

Prints a line per kill and a summary; the exit code is 0 if all is equal. --counts is a JSON file to
which the kills and differences of this call are added. Further flags (--config.a.b=v) go to both
runs. The code must stay as it is meanwhile: another program may round otherwise.

Processes are forked from this one, which has imported everything and started nothing, so that a
start takes a few seconds only.
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from recorded import record_steps

from diffusion_jax.cli import cache, main, train  # noqa: F401  both import what training needs
from diffusion_jax.devices.peers import EXIT_PEER
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config_files import load_config
from diffusion_jax.train.checkpoints.saving import load_metadata, restore_state, saved_steps
from diffusion_jax.train.writers import read_jsonl

PARTIAL = ".orbax-checkpoint-tmp"
START_SECONDS = 900  # until the first step: data, compilation
PEER_SECONDS = 60
ROUNDING = 0.02  # relative, for metrics and for the whole of the parameters
_SHOWN = 20  # problems
CLOCK = ("time", "step", "per_second", "wait", "stall", "seconds", "percentile", "memory", "mfu")


class Topology(NamedTuple):
    """Processes that train together, and how many devices each of them has."""

    processes: int
    devices: int


@contextlib.contextmanager
def _exits_with(code: int) -> Iterator[None]:
    """End this (forked) process with the block, whatever happens."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run(NamedTuple):
    """A run folder and the command that starts or continues it; records lie beside the folder."""

    workdir: pathlib.Path
    arguments: tuple[str, ...]

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / "checkpoints"

    @property
    def log(self) -> pathlib.Path:
        return self.workdir.with_suffix(".log")

    def record(self, rank: int) -> pathlib.Path:
        return self.workdir.with_suffix(f".{rank}.jsonl")

    def start(self, on: Topology) -> list["Process"]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        return [Process(self._fork(on, rank, address)) for rank in range(on.processes)]

    def _fork(self, on: Topology, rank: int, address: str) -> int:
        if pid := os.fork():
            return pid
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if "device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={on.devices}")
        os.environ["XLA_FLAGS"] = " ".join(flags)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        place = (f"--coordinator_address={address}", f"--process_id={rank}")
        with _exits_with(0):
            with record_steps(self.record(rank)):
                code = main(
                    [*self.arguments, f"--num_processes={on.processes}", *place]
                    if on.processes > 1
                    else self.arguments
                )
            sys.stdout.flush()
            os._exit(code)

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """Read the lines that are whole."""
        path = self.record(rank)
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


class Process:
    """A forked process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None when it lives longer."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Kill(NamedTuple):
    """What was seen of one kill. finished: the newest checkpoint before and after it."""

    first: int
    last: int
    finished: tuple[int, int]
    during: int | None  # the checkpoint that was being written
    others: tuple[int | None, ...] = ()  # exit codes of the processes that were not killed


class Plan(NamedTuple):
    """When to kill: some time after a step, or after the first save that is seen from it on."""

    step: int
    in_save: bool
    delay: float
    on: Topology
    victim: int


def plan_kills(kills: int, num_steps: int, every: int, seed: int, on: list[Topology]) -> list[Plan]:
    """Spread the kills over the run, so that it cannot end before the last; half of them in
    saves."""
    draw = random.Random(seed)
    span = (num_steps - 2 * every) / kills
    if span < every + 1:
        raise SystemExit(
            f"{kills} kills need {int(kills * (every + 1) + 2 * every)} steps with a checkpoint "
            f"every {every}, not {num_steps}: give --num_steps"
        )
    slack = span - every
    return [
        Plan(
            int(number * span + draw.uniform(0, slack if number % 2 else span)) + 1,
            number % 2 == 1,
            draw.uniform(0, 0.05),
            on[number % len(on)],
            draw.randrange(on[number % len(on)].processes),
        )
        for number in range(kills)
    ]


def newest(run: Run) -> int:
    steps = saved_steps(run.checkpoints)
    return steps[-1] if steps else 0


def partial(run: Run) -> list[int]:
    """Which checkpoints are being written, or were when the process died."""
    if not run.checkpoints.is_dir():
        return []
    names = [name for name in os.listdir(run.checkpoints) if PARTIAL in name]
    return sorted(int(name.partition(".")[0]) for name in names if name[0].isdigit())


def _alive(processes: list[Process], run: Run, what: str) -> None:
    for process in processes:
        if process.poll() is not None:
            log = run.log.read_text()[-3000:]
            raise SystemExit(f"a process ended with {process.code} before {what}: {log}")


def wait_for_step(run: Run, processes: list[Process], seen: int, step: int) -> None:
    """Wait until a process, with `seen` lines before it, has done a step."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        lines = run.steps()
        if len(lines) > seen and lines[-1]["step"] >= step:
            return
        _alive(processes, run, f"step {step}")
        time.sleep(0.005)
    raise SystemExit(f"step {step} was not reached within {START_SECONDS} s")


def kill_once(run: Run, plan: Plan) -> Kill:
    """Start or continue, kill as planned, and note what is left."""
    seen = len(run.steps())
    processes = run.start(plan.on)
    try:
        wait_for_step(run, processes, seen, plan.step)
        while plan.in_save and not partial(run):
            _alive(processes, run, "a save")
        time.sleep(plan.delay)
        before = newest(run)
        victim = processes.pop(plan.victim)
        victim.kill()
        victim.wait(PEER_SECONDS)
        others = tuple(process.wait(PEER_SECONDS) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait(PEER_SECONDS)
    lines, left = run.steps(), partial(run)
    during = left[-1] if left else None
    return Kill(lines[seen]["step"], lines[-1]["step"], (before, newest(run)), during, others)


def check_start(number: int, previous: Kill | None, kill: Kill) -> Iterator[str]:
    """Yield what is wrong with where a process went on after the kill before it."""
    expected = 0 if previous is None else previous.finished[1]
    if kill.first != expected + 1:
        yield f"start {number} went on at step {kill.first}, not {expected + 1}"
    if kill.finished[1] < kill.finished[0]:
        yield f"kill {number} lost checkpoint {kill.finished[0]}: {kill.finished[1]} is the newest"
    if set(kill.others) - {EXIT_PEER}:
        yield f"after kill {number} the other processes ended with {kill.others}"


def check_records(whole: Run, killed: Run, processes: int) -> Iterator[str]:
    """Yield the steps that read other records than in the undisturbed run."""
    for rank in range(processes):
        expected = {line["step"]: line["ids"] for line in whole.steps(rank)}
        found = killed.steps(rank)
        for line in found:
            if line["ids"] != expected[line["step"]]:
                yield f"step {line['step']} read {line['ids']}, not {expected[line['step']]}"
        if missing := expected.keys() - {line["step"] for line in found}:
            yield f"steps {sorted(missing)} were never done"


def check_metrics(whole: Run, killed: Run, rounding: float) -> Iterator[str]:
    """Yield logged metrics that differ."""
    rows = [_metrics(run.workdir) for run in (whole, killed)]
    if rows[0].keys() != rows[1].keys():
        yield f"other metrics were logged: {sorted(rows[0].keys() ^ rows[1].keys())[:5]}"
    for key in sorted(rows[0].keys() & rows[1].keys()):
        expected, found = rows[0][key], rows[1][key]
        if not (found == expected or abs(found - expected) <= rounding * abs(expected)):
            yield f"{key[1]} of step {key[0]} is {found!r}, not {expected!r}"


def _metrics(workdir: pathlib.Path) -> dict[tuple[float, str], float]:
    return {
        (row["step"], name): value
        for row in read_jsonl(workdir / "metrics.jsonl")
        for name, value in row.items()
        if not any(word in name for word in CLOCK)
    }


def check_states(
    whole: Run, killed: Run, config_arguments: list[str], rounding: float
) -> Iterator[str]:
    """Yield the arrays of the last checkpoints that differ in a bit (or by more than rounding);
    print how many were compared."""
    made = make_experiment(load_config(config_arguments[0], config_arguments[1:]))
    abstract = made.abstract_state()
    states = [restore_state(run.checkpoints, abstract)[0] for run in (whole, killed)]
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(s) for s in states), strict=True)
    counts: dict[str, list[int]] = {}
    squares = np.zeros(2)
    for (path, left), (_, right) in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bits = [np.asarray(leaf).tobytes() for leaf in (left, right)]
        count = counts.setdefault(name.partition("/")[0], [0, 0])
        count[:] = [count[0] + 1, count[1] + len(bits[0])]
        if name.startswith("params/"):
            squares += [np.sum(np.square(left - right)), np.sum(np.square(left))]
        if not rounding and bits[0] != bits[1]:
            yield f"{name} differs"
    for part, (arrays, size) in counts.items():
        print(f"  {part:<10} {arrays:>4} arrays {size:>12,} bytes")
    difference = float(np.sqrt(squares[0] / squares[1]))
    if difference > rounding:
        yield f"parameters differ by {difference:.1e} of their size"
    next_batches = [load_metadata(run.checkpoints)["next_batch"] for run in (whole, killed)]
    if next_batches[0] != next_batches[1]:
        yield f"the next batches are {next_batches}"
    batches = made.train_batches(made.data.source("train"))
    ids = [next(batches.iterate(n))["index"].tolist() for n in next_batches]
    print(f"  next batch {next_batches[1]}: records {ids[1]}")
    if ids[0] != ids[1]:
        yield f"the next batches hold records {ids}"


def compare(whole: Run, killed: Run, config: list[str], on: list[Topology]) -> list[str]:
    """Find all differences, in a process of its own: this one must not start JAX."""
    rounding = ROUNDING if len(set(on)) > 1 else 0.0
    reading, writing = os.pipe()
    if not os.fork():
        with _exits_with(0):
            problems = [
                *check_records(whole, killed, on[0].processes),
                *check_metrics(whole, killed, rounding),
                *check_states(whole, killed, config, rounding),
            ]
            os.write(writing, json.dumps([*problems[:_SHOWN], len(problems)]).encode())
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        found = answer.read()
    os.wait()
    *shown, count = json.loads(found) if found else ["the comparison failed", 1]
    return shown + ["one more"] * (count - len(shown))


def topologies(text: str) -> list[Topology]:
    """Read 2x1 or 1x1,1x2."""
    found = [Topology(*map(int, part.split("x"))) for part in text.split(",")]
    if len(found) > 1 and any(one.processes > 1 for one in found):
        raise argparse.ArgumentTypeError("only the devices of one process can change")
    return found


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", default="configs/mnist.py:tiny")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num_steps", type=int, help="default: 12 times --every a kill")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--workdir", help="new folder for both runs (default: a temporary one)")
    parser.add_argument("--on", type=topologies, default=[Topology(1, 1)], help="see above")
    parser.add_argument("--counts", type=pathlib.Path, help="JSON file that is added to")
    return parser.parse_known_args()


def soak(options: argparse.Namespace, overrides: list[str], folder: pathlib.Path) -> int:
    """Run both, compare, and return the exit code."""
    num_steps = options.num_steps or 12 * options.every * options.kills
    on: list[Topology] = options.on
    plans = plan_kills(options.kills, num_steps, options.every, options.seed, on)
    config = [
        f"--config.train.num_steps={num_steps}",
        f"--config.checkpoint.every={options.every}",
        "--config.hooks.scalars.every=1",  # else the first row after a kill averages fewer steps
        *overrides,
    ]
    whole, killed = (
        Run(
            folder / name,
            (f"--config={options.config}", f"--workdir={folder / name}", "--no_test", *config),
        )
        for name in ("whole", "killed")
    )
    started = time.monotonic()
    finish(whole, on[0])
    kills: list[Kill] = []
    problems: list[str] = []
    print("kill  started at  killed at  newest checkpoint  lost steps  while saving", flush=True)
    for number, plan in enumerate(plans, 1):
        kill = kill_once(killed, plan)
        problems += check_start(number, kills[-1] if kills else None, kill)
        kills.append(kill)
        print(
            f"{number:>4}  {kill.first:>10}  {kill.last:>9}  {kill.finished[1]:>17}  "
            f"{kill.last - kill.finished[1]:>10}  {kill.during or '-':>12}",
            flush=True,
        )
    seen = len(killed.steps())
    finish(killed, on[0])
    last = Kill(killed.steps()[seen]["step"], num_steps, (num_steps, newest(killed)), None)
    problems += check_start(len(kills) + 1, kills[-1], last)
    problems += compare(whole, killed, [options.config, *config], on)
    saving = sum(kill.during is not None for kill in kills)
    if not saving:
        problems.append("no kill hit a save")
    for problem in problems[:_SHOWN]:
        print(f"PROBLEM: {problem}")
    if len(problems) > _SHOWN:
        print(f"and {len(problems) - _SHOWN} more")
    seconds = time.monotonic() - started
    print(
        f"{options.config}, {num_steps} steps, a checkpoint every {options.every}: {len(kills)} "
        f"SIGKILL, {saving} of them during a save; {len(problems)} differences; {seconds:.0f} s"
    )
    if options.counts:
        add_counts(options.counts, on, np.array([len(kills), saving, len(problems)]), seconds)
    return 1 if problems else 0


def add_counts(path: pathlib.Path, on: list[Topology], counts: np.ndarray, seconds: float) -> None:
    """Add to the file of all calls, and print their sums."""
    table = json.loads(path.read_text()) if path.exists() else {}
    name = ", ".join(f"{one.processes} x {one.devices}" for one in on)
    before = table.get(name, [0, 0, 0, 0])
    table[name] = [*(counts + before[:3]).tolist(), round(seconds + before[3])]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1) + "\n")
    temporary.replace(path)
    print("processes x devices  SIGKILL  during a save  differences  seconds")
    total = np.sum(list(table.values()), axis=0).tolist()
    for row, values in itertools.chain(table.items(), [("all", total)]):
        print(f"{row:<20} {values[0]:>7}  {values[1]:>13}  {values[2]:>11}  {values[3]:>7}")


def finish(run: Run, on: Topology) -> None:
    """Run to the end; SystemExit with its log if it fails."""
    codes = [process.wait(10 * START_SECONDS) for process in run.start(on)]
    if set(codes) != {0}:
        raise SystemExit(f"{run.workdir} ended with {codes}: {run.log.read_text()[-3000:]}")


if __name__ == "__main__":
    parsed, rest = parse()
    with contextlib.ExitStack() as stack:
        place = parsed.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        pathlib.Path(place).mkdir(parents=True, exist_ok=True)
        sys.exit(soak(parsed, rest, pathlib.Path(place).absolute()))
