"""Kill training processes again and again, and see that nothing is lost but time.

    python tests/soak/kill_and_resume.py --config=configs/mnist.py:tiny --kills=20
    python tests/soak/kill_and_resume.py --kills=50 --on=2x1 --counts=counts.json

One run is left alone. Another gets SIGKILL at random moments (--seed), every other time while a
checkpoint is being written (its folder still has its temporary name after the death) and every
sixth time before its first step, and is started again with the same command. Of several processes
one or more are killed, and the others have to end by themselves. Checked are

- at every start: the first step is the one after the newest finished checkpoint, and that is no
  older than the one that was finished before the kill; every step reads the records that the
  undisturbed run read in it;
- at the end: parameters, moments, EMA, mutable collections and the step are the same bits, the next
  batch is the same, and so are all logged metrics but those of the clock.

--on=2x1 trains in 2 processes of 1 device each; --on=1x1,1x2 changes the devices from start to
start (of one process), where sums round otherwise: numbers may then differ by ROUNDING, and bits
are not compared.

Prints a line per kill and a summary; the exit code is 0 if all is equal. --counts is a JSON file to
which the kills (one for each process) and differences of this call are added. Further flags
(--config.a.b=v) go to both runs. The code must stay as it is meanwhile: another program may round
otherwise.

Processes are forked from this one, which has imported everything and started no backend, so that a
start takes one or two seconds of a processor. Kills are frequent with a small network that is only
trained:

    export JAX_COMPILATION_CACHE_DIR=$HOME/.cache/soak
    python tests/soak/kill_and_resume.py --kills=100 --every=3 --num_steps=600 \\
        --config.model="{'name': 'small_net:Net'}" --config.lr_schedule=delete \\
        --config.hooks.images=None --config.hooks.validation=None --config.checkpoint.keep_best=0
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from comparing import SHOWN, compare
from forked import LOOK_SECONDS, Process, Run, Topology

from diffusion_jax.devices.peers import EXIT_PEER
from diffusion_jax.runs.identity import code_facts
from diffusion_jax.train.checkpoints.saving import saved_steps

PARTIAL = ".orbax-checkpoint-tmp"
START_SECONDS = 900  # until the first step: data, compilation
PEER_SECONDS = 60


class Kill(NamedTuple):
    """What was seen of one start and its kill.

    first, last: its steps, None if it was killed before them. finished: the newest checkpoint
    before and after it. during: the checkpoint that was being written. victims: how many processes
    were killed. others: exit codes of the processes that were not. seconds: until the first step.
    """

    first: int | None
    last: int | None
    finished: tuple[int, int]
    during: int | None = None
    victims: int = 0
    others: tuple[int | None, ...] = ()
    seconds: float | None = None


class Plan(NamedTuple):
    """When to kill which processes.

    moment: some time after a "step", after the first "save" that is seen from it on, or in the
    "start" before the first one. delay: in seconds, or as a share of the time that a start takes.
    """

    step: int
    moment: str
    delay: float
    on: Topology
    victims: tuple[int, ...]


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
    plans = []
    for number in range(kills):
        here = on[number % len(on)]
        moment = "save" if number % 2 else "start" if number % 6 == 4 else "step"
        step = int(number * span + draw.uniform(0, slack if moment == "save" else span)) + 1
        delay = draw.uniform(0, 0.05)
        if moment == "start":  # after processes have met; one that never came is waited for
            delay = draw.uniform(0.4 if here.processes > 1 else 0.0, 1.0)
        victims = draw.sample(range(here.processes), draw.randint(1, here.processes))
        plans.append(Plan(step, moment, delay, here, tuple(victims)))
    return plans


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
    """Wait until a process, with `seen` bytes recorded before it, has done a step."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        lines = run.steps(after=seen)
        if lines and lines[-1]["step"] >= step:
            return
        _alive(processes, run, f"step {step}")
        time.sleep(LOOK_SECONDS)
    raise SystemExit(f"step {step} was not reached within {START_SECONDS} s")


def _wait_for_moment(
    run: Run, processes: list[Process], plan: Plan, seen: int, start_seconds: float
) -> float | None:
    """Wait until the processes are to be killed -> seconds until the first step if that came."""
    started, taken = time.monotonic(), None
    if plan.moment == "start":
        while time.monotonic() < started + plan.delay * start_seconds:
            _alive(processes, run, "its first step")
            time.sleep(LOOK_SECONDS)
        return None
    wait_for_step(run, processes, seen, 1)
    taken = time.monotonic() - started
    wait_for_step(run, processes, seen, plan.step)
    while plan.moment == "save" and not partial(run):
        _alive(processes, run, "a save")
        time.sleep(LOOK_SECONDS / 5)
    time.sleep(plan.delay)
    return taken


def kill_once(run: Run, plan: Plan, start_seconds: float) -> Kill:
    """Start or continue, kill as planned, and note what is left."""
    seen = run.recorded()
    processes = run.start(plan.on)
    try:
        taken = _wait_for_moment(run, processes, plan, seen, start_seconds)
        before = newest(run)
        for victim in plan.victims:
            processes[victim].kill()
        for victim in plan.victims:
            processes[victim].wait(PEER_SECONDS)
        left = [process for rank, process in enumerate(processes) if rank not in plan.victims]
        others = tuple(process.wait(PEER_SECONDS) for process in left)
    finally:
        for process in processes:
            process.kill()
            process.wait(PEER_SECONDS)
    lines, unfinished = run.steps(after=seen), partial(run)
    first, last = (lines[0]["step"], lines[-1]["step"]) if lines else (None, None)
    during = unfinished[-1] if unfinished and lines else None
    return Kill(first, last, (before, newest(run)), during, len(plan.victims), others, taken)


def check_start(number: int, previous: Kill | None, kill: Kill) -> Iterator[str]:
    """Yield what is wrong with where a process went on after the kill before it."""
    expected = 0 if previous is None else previous.finished[1]
    if kill.first not in (None, expected + 1):
        yield f"start {number} went on at step {kill.first}, not {expected + 1}"
    if kill.finished[1] < kill.finished[0]:
        yield f"kill {number} lost checkpoint {kill.finished[0]}: {kill.finished[1]} is the newest"
    if set(kill.others) - {EXIT_PEER}:
        yield f"after kill {number} the other processes ended with {kill.others}"


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
        "--config.hooks.scalars.every=1",  # else the first row after a kill averages fewer steps
        *overrides,
    ]
    common = (f"--config={options.config}", "--no_test", *config)
    whole, killed = (
        Run(
            folder / name,
            (*common, f"--workdir={folder / name}", f"--config.checkpoint.every={every}"),
        )
        for name, every in (("whole", num_steps), ("killed", options.every))
    )
    started = time.monotonic()
    finish(whole, on[0])
    kills: list[Kill] = []
    problems: list[str] = []
    start_seconds = 10.0
    print("kills  started at  killed at  newest checkpoint  lost steps  while saving", flush=True)
    for number, plan in enumerate(plans, 1):
        kill = kill_once(killed, plan, start_seconds)
        start_seconds = kill.seconds or start_seconds
        problems += check_start(number, kills[-1] if kills else None, kill)
        kills.append(kill)
        lost = "-" if kill.last is None else kill.last - kill.finished[1]
        print(
            f"{sum(one.victims for one in kills):>5}  {kill.first or '-':>10}  "
            f"{kill.last or '-':>9}  {kill.finished[1]:>17}  {lost:>10}  {kill.during or '-':>12}",
            flush=True,
        )
    seen = killed.recorded()
    finish(killed, on[0])
    first = killed.steps(after=seen)[0]["step"]
    last = Kill(first, num_steps, (num_steps, newest(killed)))
    problems += check_start(len(kills) + 1, kills[-1], last)
    problems += compare(whole, killed, [options.config, *config], on)
    count = sum(kill.victims for kill in kills)
    saving = sum(kill.victims for kill in kills if kill.during is not None)
    if not saving:
        problems.append("no kill hit a save")
    for problem in problems[:SHOWN]:
        print(f"PROBLEM: {problem}")
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more")
    seconds = time.monotonic() - started
    print(
        f"{options.config}, {num_steps} steps, a checkpoint every {options.every}: {count} "
        f"SIGKILL, {saving} of them during a save; {len(problems)} differences; {seconds:.0f} s"
    )
    if options.counts:
        add_counts(options.counts, on, np.array([count, saving, len(problems)]), seconds)
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
    # What every start would do again: read the code, and compile programs that take no second.
    code_facts()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    parsed, rest = parse()
    with contextlib.ExitStack() as stack:
        place = parsed.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        pathlib.Path(place).mkdir(parents=True, exist_ok=True)
        sys.exit(soak(parsed, rest, pathlib.Path(place).absolute()))
