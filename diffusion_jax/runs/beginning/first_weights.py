"""The weights that a new run begins from: a run, a released file, files of its encoders."""

import os
import pathlib
from collections.abc import Iterable

import jax

from diffusion_jax.convert.weights.native import read_about, read_tree
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.files.weights import (
    Reading,
    is_released,
    load_own_weights,
    native_trees,
    released_source,
)
from diffusion_jax.runs.weights import FROZEN_FOLDER, with_params
from diffusion_jax.train.checkpoints.reading import load_under, resolve_checkpoint, saved_steps
from diffusion_jax.train.checkpoints.warm_start import warm_start, warm_start_mutable
from diffusion_jax.train.state import TrainState
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted


def first_weights(experiment: Experiment, state: TrainState) -> tuple[TrainState, list[str]]:
    """Take the parameters of train.ckpt_path, and encoders from files of their own.

    Returns the state, whose average starts from them, and what was not taken, in words.
    Raises ValueError for a file or a run that does not fit.
    """
    training, drawing = experiment.training, experiment.task.drawing
    if drawing is not None and released_source(training) is None:
        reading = Reading(training.ckpt_check, training.ckpt_variant)
        own = load_own_weights(drawing.network, state.params, reading)
        state = state if own is state.params else with_params(experiment, state, own)
    if training.ckpt_path is None:
        return state, []
    return _from_path(experiment, state, training.ckpt_path)


def frozen_encoders(path: str | os.PathLike, names: Iterable[str]) -> PyTree:
    """Read the encoders that another run kept frozen -> {"conditioner": {name: params}}.

    path: what --resume takes, or a native file. names: of those to read, as far as it has them.
    """
    if read_about(path) is not None:
        held = read_tree(open_weights(os.path.expanduser(path)), "frozen/conditioner/")
        return {"conditioner": {name: held[name] for name in names if name in held}}
    folder = pathlib.Path(resolve_checkpoint(path)[0]) / FROZEN_FOLDER
    if not saved_steps(folder):
        return {}
    found = {name: load_under(f"conditioner/{name}/", folder) for name in names}
    return {"conditioner": {name: params for name, params in found.items() if params}}


def _from_path(
    experiment: Experiment, state: TrainState, path: str
) -> tuple[TrainState, list[str]]:
    """Take the parameters of a run or a released file; say what was not taken."""
    training = experiment.training
    if is_released(path):
        params, mutable, absent = experiment.task.load_released(
            state.params, state.mutable, path, training
        )
        lists = {"not loaded": absent}
    else:
        native = native_trees(path, ema=training.ckpt_ema)
        given, given_mutable = (None, None) if native is None else native
        encoders = state.params["conditioner"] if "conditioner" in state.params else {}
        loaded = warm_start(
            state.params,
            path,
            given=given,
            besides=frozen_encoders(path, encoders),
            ignore_keys=training.ignore_keys,
            load_only_unet=training.load_only_unet,
            ema=training.ckpt_ema,
            fit=experiment.task.fit_run,
        )
        params, mutable = loaded.params, state.mutable
        if jax.tree.leaves(mutable):
            mutable = warm_start_mutable(
                mutable, path, given=given_mutable, ignore_keys=training.ignore_keys
            )
        lists = {"not loaded": loaded.not_loaded, "not used": loaded.unused}
    lines = [
        f"{path}: {counted(len(names), 'parameter', 'parameters')} {what}"
        + "".join(f"\n  {n}" for n in names)
        for what, names in lists.items()
    ]
    # The average starts from the loaded weights; upstream leaves it at the random ones it was made
    # with.
    return with_params(experiment, state, params, mutable), lines
