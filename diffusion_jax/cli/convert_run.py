"""What `python launch.py convert` does with a whole training state: runs, and first stages."""

import argparse
import pathlib

import ml_collections
import numpy as np

from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.binding import DTYPES
from diffusion_jax.experiment.first_stage_weights import (
    export_first_stage,
    export_first_stage_folder,
    load_first_stage,
)
from diffusion_jax.experiment.weights import make_frozen, open_part, run_frozen, start_frozen
from diffusion_jax.runs import folder as run_folder
from diffusion_jax.train.checkpoints.saving import open_checkpoints, restore_state, state_bytes
from diffusion_jax.train.ema import has_ema, reset_ema
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree


def convert_first_stage(
    arguments: argparse.Namespace,
    config: ml_collections.ConfigDict,
    target: pathlib.Path,
    form: str,
    *,
    is_run: bool,
) -> None:
    """Convert the training of a first stage: a run, or a file that the config describes."""
    built = make_experiment(config)
    source = pathlib.Path(arguments.source)
    if is_run and form == "run":
        raise ValueError(f"--from={source} is a run already; choose another format")
    if arguments.with_ema and not is_run:
        raise ValueError("--with_ema is for runs: a released file has one set of weights")
    if is_run:
        state, _ = restore_state(source / "checkpoints", built.abstract_state(), arguments.step)
        frozen = run_frozen(built, source)
    else:
        weights = open_part(source, "vae")
        state, absent = load_first_stage(built.init_state(), weights, ema=arguments.ema)
        if absent:
            print(f"{source} has no {' and no '.join(absent)}: initial values stay")
        frozen = make_frozen(built, source)
    if form == "run":
        write_run(built, state, frozen, config, target)
        return
    averaged = None
    if is_run and (arguments.with_ema or not arguments.raw):
        if not has_ema(state.opt_state):
            raise ValueError(f"--from={source} is a run without averages; add --raw")
        averaged = built.task.averaged(state)
    dtype = None if arguments.dtype is None else np.dtype(DTYPES[arguments.dtype])
    if form == "diffusers":
        params = state.params if averaged is None else averaged
        export_first_stage_folder(built, params, target, dtype=dtype)
        return
    twins = arguments.with_ema
    export_first_stage(state, frozen, target, averaged=averaged, dtype=dtype, twins=twins)


def write_run(
    built: Experiment,
    state: TrainState,
    frozen: PyTree,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
) -> None:
    """Make a run that has done no step yet and starts from these weights."""
    with run_folder.claim(workdir, config):
        opt_state, averaged = state.opt_state, built.task.averaged_part(state.params)
        opt_state = reset_ema(opt_state, averaged) if has_ema(opt_state) else opt_state
        state = state._replace(opt_state=opt_state)
        checkpoints = open_checkpoints(workdir / "checkpoints", needed_bytes=state_bytes(state))
        checkpoints.save(0, state, {"config": run_folder.to_plain(config), "revision": "converted"})
        checkpoints.close()
        start_frozen(built, workdir, frozen)
