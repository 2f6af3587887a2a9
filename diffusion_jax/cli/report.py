"""`report`: what runs did, from what they wrote, without a device."""

import argparse
import pathlib
import sys

from diffusion_jax.cli.program import program_name
from diffusion_jax.runs.report.gathering import gather
from diffusion_jax.runs.report.page import MISSING, PAGE, can_draw, write_json, write_page
from diffusion_jax.runs.report.text import text_report


def run(arguments: argparse.Namespace) -> int:
    """Print a summary of each run and write the page that shows them; return 0."""
    folders = [*([arguments.workdir] if arguments.workdir else []), *arguments.folders]
    if not folders:
        raise ValueError("name at least one run: report DIR [DIR ...]")
    runs = [gather(folder) for folder in dict.fromkeys(folders)]
    for found in runs:
        print("\n".join(text_report(found)))
    if arguments.json:
        print(f"wrote {write_json(pathlib.Path(arguments.json), runs)}")
    page = runs[0].folder / PAGE if len(runs) == 1 else pathlib.Path(PAGE)
    if arguments.out or can_draw():
        page = pathlib.Path(arguments.out) if arguments.out else page
        print(f"wrote {write_page(page, runs, program_name())}")
    else:
        print(MISSING, file=sys.stderr)
    return 0


def report_page(workdir: pathlib.Path, program: str) -> None:
    """Write the page of a run that just ended; say in one line where it is or why there is none."""
    try:
        print(f"report: {write_page(workdir / PAGE, [gather(workdir)], program)}")
    except (OSError, ValueError) as error:
        print(f"no report: {error}", file=sys.stderr)
