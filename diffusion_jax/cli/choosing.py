"""Which run `train` is about: its folder, its config and the checkpoint that it goes on from."""

import argparse
import pathlib

import ml_collections

from diffusion_jax.devices import processes
from diffusion_jax.experiment.config_files import load_config, override_config
from diffusion_jax.runs import folder as run_folder
from diffusion_jax.train.checkpoints.reading import resolve_checkpoint


def choose_run(
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
