"""`runs`: the runs in folders, with step, age and best score."""

import argparse
import pathlib

from diffusion_jax.runs.listing import list_runs, run_lines

# Where runs are made without --workdir, and where the documentation makes them.
FOLDERS = ("logs", "runs")


def run(arguments: argparse.Namespace) -> int:
    """Print a table of the runs in folders, the newest first; return 0.

    Raises FileNotFoundError for a folder that is not there, and where none is named and none found.
    """
    folders = arguments.folders or [name for name in FOLDERS if pathlib.Path(name).is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"here is no folder {' or '.join(FOLDERS)}; name one that holds runs: runs FOLDER"
        )
    found = list_runs(*folders)
    lines = run_lines(found) if found else [f"{', '.join(folders)}: no runs"]
    print("\n".join(lines))
    return 0
