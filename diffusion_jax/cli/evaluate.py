"""`evaluate`: the losses of a run on a split of its data, or metrics of its samples."""

import argparse

from diffusion_jax.experiment.scoring import ScoringOptions
from diffusion_jax.runs.measuring.evaluation import evaluate_run, evaluation_lines
from diffusion_jax.runs.measuring.scoring import score_run
from diffusion_jax.wording import counted

# Flags that go to ScoringOptions by their own names.
_SCORING = ("features", "weights", "num_samples", "num_steps", "reference")


def run(arguments: argparse.Namespace) -> int:
    """Print losses with raw and with EMA weights, or with --metrics how samples score; return 0."""
    return _losses(arguments) if arguments.metrics is None else _metrics(arguments)


def _metrics(arguments: argparse.Namespace) -> int:
    options = scoring_options(arguments)
    found = score_run(
        arguments.workdir,
        options,
        step=arguments.step,
        overrides=arguments.overrides,
        samples=arguments.samples,
    )
    samples = counted(options.num_samples, "sample", "samples")
    print(f"{arguments.workdir}, {samples}, features of {options.features}:")
    for name, value in found.items():
        print(f"  {name:36} {value:.6g}")
    if arguments.samples is not None:
        print(f"wrote the samples to {arguments.samples}")
    return 0


def scoring_options(arguments: argparse.Namespace) -> ScoringOptions:
    """Make the options of --metrics from the flags beside it."""
    asked = {name: getattr(arguments, name) for name in (*_SCORING, "split")}
    given = {name: value for name, value in asked.items() if value is not None}
    names = tuple(name for name in arguments.metrics.split(",") if name)
    return ScoringOptions(metrics=names, **given)


def check_no_scoring(arguments: argparse.Namespace, *more: str) -> None:
    """Raise ValueError for flags of --metrics, and more, when it is not given."""
    wrong = [name for name in (*_SCORING, *more) if getattr(arguments, name) is not None]
    if wrong:
        raise ValueError(f"--{wrong[0]} should come with --metrics")


def _losses(arguments: argparse.Namespace) -> int:
    check_no_scoring(arguments, "samples")
    split = arguments.split or "test"
    found = evaluate_run(
        arguments.workdir, split, step=arguments.step, overrides=arguments.overrides
    )
    print(f"{arguments.workdir}, " + "\n".join(evaluation_lines(found, split)))
    return 0
