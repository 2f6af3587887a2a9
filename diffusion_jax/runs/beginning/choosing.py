"""Which run is trained: its folder, its config and the checkpoint that it goes on from."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

from diffusion_jax.devices import processes
from diffusion_jax.experiment.config.files import (
    ConfigFile,
    load_config_beside_file,
    override_config,
)
from diffusion_jax.runs import folder
from diffusion_jax.train.checkpoints.reading import resolve_checkpoint


class Wanted(NamedTuple):
    """The flags of `train` that choose a run."""

    overrides: Sequence[str] = ()
    config: str | None = None
    workdir: str | None = None
    logdir: str = "logs"
    name: str = ""
    postfix: str = ""
    resume: str | None = None
    fork: str | None = None
    seed: int | None = None


class Chosen(NamedTuple):
    """A run: its folder and config, the checkpoint that it goes on from, and its config's file."""

    workdir: pathlib.Path
    config: ml_collections.ConfigDict
    step: int | str | None = None
    file: ConfigFile | None = None


def choose_run(wanted: Wanted) -> Chosen:
    """Find what to train in which folder, and from which checkpoint."""
    if wanted.resume and (wanted.config or wanted.workdir or wanted.name):
        raise ValueError(
            f"--resume={wanted.resume} brings its own config and folder; "
            "drop --config, --workdir and --name"
        )
    if wanted.fork and not wanted.resume:
        raise ValueError(f"--fork={wanted.fork} needs --resume=RUN, the run that it begins from")
    step = file = None
    if wanted.resume:
        workdir = source = pathlib.Path(wanted.fork or wanted.resume)
        if not (wanted.fork and folder.has_run(workdir)):  # which holds all that it needs
            source, step = resolve_checkpoint(wanted.resume)
        workdir = workdir if wanted.fork else pathlib.Path(source)
        config = folder.load_saved_config(pathlib.Path(source))
        config = override_config(config, wanted.overrides)
    elif wanted.config:
        config, file = load_config_beside_file(wanted.config, wanted.overrides)
        named = {"name": wanted.name, "postfix": wanted.postfix}
        new = folder.new_run_folder(wanted.logdir, wanted.config, **named)
        workdir = pathlib.Path(wanted.workdir or new)
        # Its name holds the time, which may differ from process to process.
        workdir = pathlib.Path(processes.same_for_all(str(workdir)))
    else:
        raise ValueError(
            "nothing to train: give --config=configs/mnist.py, or --resume=RUN; see --help"
        )
    if wanted.seed is not None:
        with config.unlocked():
            config.seed = wanted.seed
    return Chosen(workdir, config, step, file)
