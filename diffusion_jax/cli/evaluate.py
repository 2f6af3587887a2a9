"""`evaluate`: the losses of a run on a split of its data, or metrics of its samples."""

import argparse

from diffusion_jax.experiment.scoring import ScoringOptions
from diffusion_jax.runs.evaluation import evaluate_run
from diffusion_jax.runs.levels import level_lines
from diffusion_jax.runs.scoring import score_run

# Flags that go to ScoringOptions by their own names.
_SCORING = ("features", "weights", "num_samples", "num_steps", "reference")


def run(arguments: argparse.Namespace) -> int:
    """Print losses with raw and with EMA weights, or with --metrics how samples score; return 0."""
    return _losses(arguments) if arguments.metrics is None else _metrics(arguments)


def _metrics(arguments: argparse.Namespace) -> int:
    asked = {name: getattr(arguments, name) for name in _SCORING}
    asked["split"] = arguments.split
    given = {name: value for name, value in asked.items() if value is not None}
    names = tuple(name for name in arguments.metrics.split(",") if name)
    options = ScoringOptions(metrics=names, **given)
    found = score_run(
        arguments.workdir,
        options,
        step=arguments.step,
        overrides=arguments.overrides,
        samples=arguments.samples,
    )
    print(f"{arguments.workdir}, {options.num_samples} samples, features of {options.features}:")
    for name, value in found.items():
        print(f"  {name:36} {value:.6g}")
    if arguments.samples is not None:
        print(f"wrote the samples to {arguments.samples}")
    return 0


def _losses(arguments: argparse.Namespace) -> int:
    wrong = [name for name in (*_SCORING, "samples") if getattr(arguments, name) is not None]
    if wrong:
        raise ValueError(f"--{wrong[0]} should come with --metrics")
    split = arguments.split or "test"
    found = evaluate_run(
        arguments.workdir, split, step=arguments.step, overrides=arguments.overrides
    )
    records = f"{found.num_examples} records of {split}"
    print(f"{arguments.workdir}, step {found.step}, {records}:")
    for name, value in sorted(found.losses.items()):
        print(f"  {name:32} {value:.6g}")
    for line in [] if found.levels is None else level_lines(found.levels):
        print(f"  {line}")
    if found.bits is not None:
        count = min(found.bits_images, found.num_examples)
        name = f"{split}/bits_per_dim"
        print(f"  {name:32} {found.bits:.4f}, at most, over the first {count} images")
    return 0
