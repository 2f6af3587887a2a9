"""What differs between a run that was killed again and again and one that was left alone."""

import json
import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from forked import Run, Topology, exits_with

from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.train.checkpoints.saving import load_metadata, restore_state
from diffusion_jax.train.writers import read_jsonl

ROUNDING = 0.02  # relative, for metrics and for the whole of the parameters
SHOWN = 20  # problems
CLOCK = ("time", "step", "per_second", "wait", "stall", "seconds", "percentile", "memory", "mfu")


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
        with exits_with(0):
            problems = [
                *check_records(whole, killed, on[0].processes),
                *check_metrics(whole, killed, rounding),
                *check_states(whole, killed, config, rounding),
            ]
            os.write(writing, json.dumps([*problems[:SHOWN], len(problems)]).encode())
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        found = answer.read()
    os.wait()
    *shown, count = json.loads(found) if found else ["the comparison failed", 1]
    return shown + ["one more"] * (count - len(shown))
