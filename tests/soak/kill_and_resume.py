"""Kill a training process again and again, and see that nothing is lost but time.

    python tests/soak/kill_and_resume.py --config=configs/mnist.py:tiny --kills=20

One run is left alone. Another gets SIGKILL at random moments (--seed), every other time while a
checkpoint is being written (its folder still has its temporary name after the death), and is
started again with the same command. Checked are

- at every start: the first step is the one after the newest finished checkpoint, and that is no
  older than the one that was finished before the kill; every step reads the records that the
  undisturbed run read in it;
- at the end: parameters, moments, EMA, mutable collections and the step are the same bits, the next
  batch is the same, and so are all logged metrics but those of the clock.

Prints a line per kill and a summary; the exit code is 0 if all is equal. Further flags
(--config.a.b=v) go to both runs. The code must stay as it is meanwhile: another program may round
otherwise.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config_files import load_config
from diffusion_jax.train.checkpoints.saving import load_metadata, restore_state, saved_steps
from diffusion_jax.train.writers import read_jsonl

ROOT = pathlib.Path(__file__).parents[2]
PARTIAL = ".orbax-checkpoint-tmp"
START_SECONDS = 900  # until the first step: imports, data, compilation
_SHOWN = 20  # problems
CLOCK = ("time", "step", "per_second", "wait", "stall", "seconds", "percentile", "memory", "mfu")


class Run(NamedTuple):
    """A run folder, the file with a line per step, and the command that starts or continues it."""

    workdir: pathlib.Path
    record: pathlib.Path
    arguments: tuple[str, ...]

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / "checkpoints"

    def start(self) -> subprocess.Popen:
        with (self.workdir.parent / f"{self.workdir.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "tests/soak/recorded.py"), *self.arguments],
                env=os.environ | {"RECORD": str(self.record)},
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def steps(self) -> list[dict[str, Any]]:
        """Read the lines that are whole."""
        text = self.record.read_text() if self.record.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


class Kill(NamedTuple):
    """What was seen of one kill. finished: the newest checkpoint before and after it."""

    first: int
    last: int
    finished: tuple[int, int]
    during: int | None  # the checkpoint that was being written


class Plan(NamedTuple):
    """When to kill: some time after a step, or after the first save that is seen from it on."""

    step: int
    in_save: bool
    delay: float


def plan_kills(kills: int, num_steps: int, every: int, seed: int) -> list[Plan]:
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


def wait_for_step(run: Run, process: subprocess.Popen, seen: int, step: int) -> None:
    """Wait until a process, with `seen` lines before it, has done a step."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        lines = run.steps()
        if len(lines) > seen and lines[-1]["step"] >= step:
            return
        if process.poll() is not None:
            raise SystemExit(f"the process ended with {process.returncode} before step {step}")
        time.sleep(0.005)
    raise SystemExit(f"step {step} was not reached within {START_SECONDS} s")


def kill_once(run: Run, plan: Plan) -> Kill:
    """Start or continue, kill as planned, and note what is left."""
    seen = len(run.steps())
    process = run.start()
    try:
        wait_for_step(run, process, seen, plan.step)
        while plan.in_save and not partial(run):
            if process.poll() is not None:
                raise SystemExit("the process ended while a save was awaited")
        time.sleep(plan.delay)
        before = newest(run)
    finally:
        process.kill()
        process.wait()
    lines, left = run.steps(), partial(run)
    return Kill(
        lines[seen]["step"], lines[-1]["step"], (before, newest(run)), left[-1] if left else None
    )


def check_start(number: int, previous: Kill | None, kill: Kill) -> Iterator[str]:
    """Yield what is wrong with where a process went on after the kill before it."""
    expected = 0 if previous is None else previous.finished[1]
    if kill.first != expected + 1:
        yield f"start {number} went on at step {kill.first}, not {expected + 1}"
    if kill.finished[1] < kill.finished[0]:
        yield f"kill {number} lost checkpoint {kill.finished[0]}: {kill.finished[1]} is the newest"


def check_records(whole: Run, killed: Run) -> Iterator[str]:
    """Yield the steps that read other records than in the undisturbed run."""
    expected = {line["step"]: line["ids"] for line in whole.steps()}
    found = killed.steps()
    for line in found:
        if line["ids"] != expected[line["step"]]:
            yield f"step {line['step']} read {line['ids']}, not {expected[line['step']]}"
    if missing := expected.keys() - {line["step"] for line in found}:
        yield f"steps {sorted(missing)} were never done"


def check_metrics(whole: Run, killed: Run) -> Iterator[str]:
    """Yield logged metrics that differ."""
    rows = [_metrics(run.workdir) for run in (whole, killed)]
    if rows[0].keys() != rows[1].keys():
        yield f"other metrics were logged: {sorted(rows[0].keys() ^ rows[1].keys())[:5]}"
    for key in sorted(rows[0].keys() & rows[1].keys()):
        if rows[0][key] != rows[1][key]:
            yield f"{key[1]} of step {key[0]} is {rows[1][key]!r}, not {rows[0][key]!r}"


def _metrics(workdir: pathlib.Path) -> dict[tuple[float, str], float]:
    return {
        (row["step"], name): value
        for row in read_jsonl(workdir / "metrics.jsonl")
        for name, value in row.items()
        if not any(word in name for word in CLOCK)
    }


def check_states(whole: Run, killed: Run, config_arguments: list[str]) -> Iterator[str]:
    """Yield the arrays of the last checkpoints that differ in a bit; print how many were
    compared."""
    made = make_experiment(load_config(config_arguments[0], config_arguments[1:]))
    abstract = made.abstract_state()
    states = [restore_state(run.checkpoints, abstract)[0] for run in (whole, killed)]
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(s) for s in states), strict=True)
    counts: dict[str, list[int]] = {}
    for (path, left), (_, right) in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bits = [np.asarray(leaf).tobytes() for leaf in (left, right)]
        count = counts.setdefault(name.partition("/")[0], [0, 0])
        count[:] = [count[0] + 1, count[1] + len(bits[0])]
        if bits[0] != bits[1]:
            yield f"{name} differs"
    for part, (arrays, size) in counts.items():
        print(f"  {part:<10} {arrays:>4} arrays {size:>12,} bytes")
    next_batches = [load_metadata(run.checkpoints)["next_batch"] for run in (whole, killed)]
    if next_batches[0] != next_batches[1]:
        yield f"the next batches are {next_batches}"
    batches = made.train_batches(made.data.source("train"))
    ids = [next(batches.iterate(n))["index"].tolist() for n in next_batches]
    print(f"  next batch {next_batches[1]}: records {ids[1]}")
    if ids[0] != ids[1]:
        yield f"the next batches hold records {ids}"


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", default="configs/mnist.py:tiny")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num_steps", type=int, help="default: 12 times --every a kill")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--workdir", help="new folder for both runs (default: a temporary one)")
    return parser.parse_known_args()


def soak(options: argparse.Namespace, overrides: list[str], folder: pathlib.Path) -> int:
    """Run both, compare, and return the exit code."""
    num_steps = options.num_steps or 12 * options.every * options.kills
    plans = plan_kills(options.kills, num_steps, options.every, options.seed)
    config = [
        f"--config.train.num_steps={num_steps}",
        f"--config.checkpoint.every={options.every}",
        "--config.hooks.scalars.every=1",  # else the first row after a kill averages fewer steps
        *overrides,
    ]
    whole, killed = (
        Run(
            folder / name,
            folder / f"{name}.jsonl",
            (f"--config={options.config}", f"--workdir={folder / name}", "--no_test", *config),
        )
        for name in ("whole", "killed")
    )
    started = time.monotonic()
    finish(whole)
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
    finish(killed)
    last = Kill(killed.steps()[seen]["step"], num_steps, (num_steps, newest(killed)), None)
    problems += check_start(len(kills) + 1, kills[-1], last)
    problems += check_records(whole, killed)
    problems += check_metrics(whole, killed)
    problems += check_states(whole, killed, [options.config, *config])
    saving = sum(kill.during is not None for kill in kills)
    if not saving:
        problems.append("no kill hit a save")
    for problem in problems[:_SHOWN]:
        print(f"PROBLEM: {problem}")
    if len(problems) > _SHOWN:
        print(f"and {len(problems) - _SHOWN} more")
    print(
        f"{options.config}, {num_steps} steps, a checkpoint every {options.every}: {len(kills)} "
        f"SIGKILL, {saving} of them during a save; {len(problems)} differences; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if problems else 0


def finish(run: Run) -> None:
    """Run to the end; SystemExit with its log if it fails."""
    code = run.start().wait()
    if code != 0:
        log = (run.workdir.parent / f"{run.workdir.name}.log").read_text()
        raise SystemExit(f"{run.workdir} ended with exit code {code}: {log[-3000:]}")


if __name__ == "__main__":
    parsed, rest = parse()
    with contextlib.ExitStack() as stack:
        place = parsed.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        pathlib.Path(place).mkdir(parents=True, exist_ok=True)
        sys.exit(soak(parsed, rest, pathlib.Path(place).absolute()))
