"""`report`: what a run did, from what it wrote, without a device."""

import argparse

from diffusion_jax.runs.report import report_run


def run(arguments: argparse.Namespace) -> int:
    """Print the report of a run; return 0."""
    if arguments.overrides:
        raise ValueError(f"{arguments.overrides[0]} does not fit: a report has no config to change")
    print("\n".join(report_run(arguments.workdir)))
    return 0
