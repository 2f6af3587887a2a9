"""`runs`: the runs in a folder, with step, age and best score."""

import argparse

from diffusion_jax.runs.listing import list_runs, run_lines


def run(arguments: argparse.Namespace) -> int:
    """Print a table of the runs in a folder, the newest first; return 0."""
    found = list_runs(arguments.folder)
    if not found:
        print(f"{arguments.folder} holds no runs")
        return 0
    print("\n".join(run_lines(found)))
    return 0
