"""`ema`: write a run's average of another length, or evaluate several lengths."""

import argparse

from diffusion_jax.cli.evaluate import check_no_scoring, scoring_options
from diffusion_jax.cli.program import program_name
from diffusion_jax.runs.averages import sweep, write_average, write_sweep


def run(arguments: argparse.Namespace) -> int:
    """Write the average of --length, or print and write the table of --lengths; return 0."""
    if (arguments.length is None) == (arguments.lengths is None):
        raise ValueError("give --length=0.1 to write one average, or --lengths=0.05,0.1 to compare")
    if arguments.metrics is None:
        check_no_scoring(arguments)
    return _sweep(arguments) if arguments.length is None else _write(arguments)


def _write(arguments: argparse.Namespace) -> int:
    for name in ("split", "metrics"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} should come with --lengths")
    found, average = write_average(
        arguments.workdir, arguments.length, step=arguments.step, out=arguments.out
    )
    print(f"wrote {found}; its profile is met within {average.distance:.1%}")
    print(f"draw images: {program_name()} sample --workdir={found}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        raise ValueError("--out should come with --length")
    try:
        lengths = [float(text) for text in arguments.lengths.split(",")]
    except ValueError as error:
        raise ValueError(f"--lengths = {arguments.lengths!r} should be like 0.05,0.1") from error
    scoring = None if arguments.metrics is None else scoring_options(arguments)
    split = arguments.split or "validation"
    rows = sweep(arguments.workdir, lengths, split, step=arguments.step, scoring=scoring)
    for line in write_sweep(arguments.workdir, rows):
        print(line, flush=True)
    return 0
