"""`train`: train a run, or continue it, then test it."""

import argparse
import functools
import io
import pathlib
import sys
from typing import cast

import jax

from diffusion_jax.cli.debugging import debugging
from diffusion_jax.cli.program import program_name
from diffusion_jax.cli.report import report_page
from diffusion_jax.runs import folder as run_folder
from diffusion_jax.runs.beginning.choosing import Wanted, choose_run
from diffusion_jax.runs.command_line import fields_of
from diffusion_jax.runs.failures import EXIT_NOT_A_NUMBER, EXIT_SIGNAL
from diffusion_jax.runs.report.page import can_draw
from diffusion_jax.runs.training import SIGNALS, Result, RunEvent, train_run


def run(arguments: argparse.Namespace) -> int:
    """Train until the config's last step, a stop or a signal; return the exit code."""
    workdir, config, step, file = choose_run(fields_of(Wanted, arguments))
    fresh = not (arguments.workdir or arguments.resume)
    with debugging(arguments.debug):
        result = train_run(
            config,
            workdir,
            resume=True if step is None or arguments.fork else step,
            change=arguments.change or (),
            fork=arguments.resume if arguments.fork else None,
            accept_data_change=arguments.accept_data_change,
            on_event=functools.partial(_tell, workdir if fresh else None),
            progress=cast(io.TextIOBase, sys.stderr),
            donate=not arguments.debug,
            test=not arguments.no_test,
            config_file=file,
        )
    return _finish(result, workdir)


def _tell(new: pathlib.Path | None, event: RunEvent) -> None:
    """Print what a run says; a new run in --logdir becomes its `latest` when it starts."""
    print(event.text, flush=True)
    if new is not None and event.kind == "starts":
        run_folder.point_latest(new)


def _finish(result: Result, workdir: pathlib.Path) -> int:
    """Say how to go on; choose the exit code."""
    stopped = result.stopped
    if stopped is not None and not stopped.save:
        return EXIT_NOT_A_NUMBER
    if stopped is not None and stopped.reason in SIGNALS:
        _say(f"saved; the same command, or --resume={workdir}, goes on from here")
        return EXIT_SIGNAL
    if result.experiment.task.drawing is not None:
        _say(f"draw images: {program_name()} sample --workdir={workdir}")
    if jax.process_index() == 0 and can_draw():
        report_page(workdir, program_name())
    return 0


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
