"""`train`: train a run, or continue it, then test it."""

import argparse
import io
import pathlib
import sys
from typing import cast

import jax
import ml_collections

from diffusion_jax.cli.debugging import debugging
from diffusion_jax.cli.program import EXIT_NOT_A_NUMBER, EXIT_SIGNAL, exit_code, program_name
from diffusion_jax.devices import processes
from diffusion_jax.experiment.config_files import load_config, override_config
from diffusion_jax.runs import folder as run_folder
from diffusion_jax.runs.training import SIGNALS, Result, train_run
from diffusion_jax.train.checkpoints.reading import resolve_checkpoint


def run(arguments: argparse.Namespace) -> int:
    """Train until the config's last step, a stop or a signal; return the exit code."""
    flags = "coordinator_address num_processes process_id local_device_ids".split()
    place = processes.place_of_flags(*(getattr(arguments, flag) for flag in flags))
    with processes.joined(place, exit_code):
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    workdir, config, step = _run_folder_and_config(arguments)
    with debugging(arguments.debug):
        result = train_run(
            config,
            workdir,
            resume=True if step is None or arguments.fork else step,
            change=arguments.change or (),
            fork=arguments.resume if arguments.fork else None,
            accept_data_change=arguments.accept_data_change,
            on_event=lambda event: print(event.text, flush=True),
            progress=cast(io.TextIOBase, sys.stderr),
            donate=not arguments.debug,
            test=not arguments.no_test,
        )
    return _finish(result, workdir)


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
    return 0


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _run_folder_and_config(
    arguments: argparse.Namespace,
) -> tuple[pathlib.Path, ml_collections.ConfigDict, int | str | None]:
    """Find what to train in which folder, and from which checkpoint."""
    if arguments.resume and (arguments.config or arguments.workdir or arguments.name):
        raise ValueError(
            f"--resume={arguments.resume} brings its own config and folder; "
            "drop --config, --workdir and --name"
        )
    if arguments.fork and not arguments.resume:
        raise ValueError(f"--fork={arguments.fork} needs --resume=RUN, the run that it begins from")
    step = None
    if arguments.resume:
        workdir = source = pathlib.Path(arguments.fork or arguments.resume)
        if not (arguments.fork and run_folder.has_run(workdir)):  # which holds all that it needs
            source, step = resolve_checkpoint(arguments.resume)
        workdir = workdir if arguments.fork else pathlib.Path(source)
        config = run_folder.load_saved_config(pathlib.Path(source))
        config = override_config(config, arguments.overrides)
    elif arguments.config:
        config = load_config(arguments.config, arguments.overrides)
        named = {"name": arguments.name, "postfix": arguments.postfix}
        new = run_folder.new_run_folder(arguments.logdir, arguments.config, **named)
        workdir = pathlib.Path(arguments.workdir or new)
        # Its name holds the time, which may differ from process to process.
        workdir = pathlib.Path(processes.same_for_all(str(workdir)))
    else:
        raise ValueError(
            "nothing to train: give --config=configs/mnist.py, or --resume=RUN; see --help"
        )
    if arguments.seed is not None:
        with config.unlocked():
            config.seed = arguments.seed
    return workdir, config, step
