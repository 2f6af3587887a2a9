"""The weights of a run: its frozen networks, saved once, and what was trained, read back."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from diffusion_jax.convert.weights.native import import_tree, read_about
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.files.claims import check_claims
from diffusion_jax.experiment.files.weights import released_source
from diffusion_jax.experiment.task import Trained
from diffusion_jax.train.checkpoints.reading import load_mutable, load_params, saved_steps
from diffusion_jax.train.checkpoints.saving import open_checkpoints, restore_state
from diffusion_jax.train.ema import averages_of
from diffusion_jax.train.optimizer_state import restarted
from diffusion_jax.train.state import TrainState, owned
from diffusion_jax.types import PyTree

FROZEN_FOLDER = "frozen"


def make_frozen(experiment: Experiment, source: str | os.PathLike | None = None) -> PyTree:
    """Make what training reads and never changes, on its devices: constants and frozen networks.

    A network's own `weights` file comes first, then source, a released checkpoint (default: the
    config's train.ckpt_path), then random weights where the config asks for them.
    Raises ConfigError when a network has no weights, ValueError when a file does not fit.
    """
    if source is None:
        experiment.task.check_sources()
        source = released_source(experiment.training)
    abstract, random = experiment.abstract_frozen(), experiment.random_frozen
    return experiment.frozen_constants() | experiment.task.load_frozen(abstract, random, source)


def run_frozen(experiment: Experiment, workdir: pathlib.Path) -> PyTree:
    """Read the frozen networks that a run saved at its start, beside the constants of its config.

    Raises FileNotFoundError when the run has frozen networks and did not save them.
    """
    frozen = experiment.frozen_constants()
    weights = _weights_of(experiment.abstract_frozen(), frozen)
    if not jax.tree.leaves(weights):
        return frozen | weights
    return frozen | restore_state(workdir / FROZEN_FOLDER, weights)[0]


def has_frozen(workdir: pathlib.Path) -> bool:
    """Tell whether a run has saved its frozen networks."""
    return bool(saved_steps(workdir / FROZEN_FOLDER))


def holds_frozen(experiment: Experiment, workdir: pathlib.Path) -> bool:
    """Tell whether a run has all of its frozen networks in its folder, or has none."""
    weights = _weights_of(experiment.abstract_frozen(), experiment.task.constants)
    return has_frozen(workdir) or not jax.tree.leaves(weights)


def start_frozen(
    experiment: Experiment,
    workdir: pathlib.Path,
    frozen: PyTree | None = None,
    *,
    first_batch: Callable[[], Mapping[str, Any]] | None = None,
    going_on: bool = False,
) -> PyTree:
    """Make the frozen networks of a run and save them once, or read what an earlier start saved.

    frozen: the networks if they are made already. first_batch gives the host batch that
    scale_by_std looks at. going_on: the run has checkpoints, so it needs no file that it began
    from.
    """
    if has_frozen(workdir) or (going_on and holds_frozen(experiment, workdir)):
        return run_frozen(experiment, workdir)
    frozen = dict(make_frozen(experiment) if frozen is None else frozen)
    first_frozen = experiment.task.first_frozen
    if first_frozen is not None and first_batch is not None:
        frozen = first_frozen(frozen, experiment.to_devices(first_batch()))
    weights = _weights_of(frozen, experiment.task.constants)
    if jax.tree.leaves(weights):
        checkpoints = open_checkpoints(workdir / FROZEN_FOLDER, keep_last=1)
        checkpoints.save(0, weights, {"what": "weights of the frozen networks"})
        checkpoints.close()
    return frozen


def load_trained(
    experiment: Experiment, workdir: pathlib.Path, *, step: int | None = None, ema: bool = True
) -> Trained:
    """Read what a run has trained, from its newest checkpoint or the one of `step`; no optimizer.

    ema: the averages in place of what is averaged. Raises FileNotFoundError when there is no such
    checkpoint, ValueError when it is damaged, of another config, or keeps no averages.
    """
    params = load_trained_params(experiment, workdir, step=step, ema=ema)
    has_mutable = jax.tree.leaves(experiment.abstract_state().mutable)
    mutable = load_mutable(workdir / "checkpoints", step=step) if has_mutable else {}
    return Trained(params, mutable, run_frozen(experiment, workdir))


def load_trained_params(
    experiment: Experiment, workdir: pathlib.Path, *, step: int | None = None, ema: bool = True
) -> PyTree:
    """Read the parameters alone, see load_trained."""
    folder, abstract = workdir / "checkpoints", experiment.abstract_state()
    averaged = experiment.task.averaged_part(abstract.params)
    params: dict[str, Any] = {}
    if not ema or averaged.keys() != abstract.params.keys():
        params = load_params(folder, abstract.params, step=step, ema=False)
    if ema:
        # The averages may be kept in another dtype than the parameters.
        kept = next(iter(averages_of(abstract.opt_state)), averaged)
        found = load_params(folder, kept, step=step, ema=True)
        params |= jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), found, averaged)
    return params


def load_checkpoint_file(
    experiment: Experiment, path: str | os.PathLike, *, ema: bool = False
) -> tuple[Trained, list[str]]:
    """Read a released file as the model of a config -> (Trained, names of what it had not).

    ema: the averages that training files (.ckpt) keep. What the file has not keeps its initial
    values. Raises ValueError when the file does not fit, naming what is missing or left over, and
    when it says of itself what the config contradicts, naming the overrides to add.
    """
    if read_about(path) is not None:
        return _load_native(experiment, path, ema), []
    abstract = experiment.abstract_state()
    training = experiment.training._replace(
        ckpt_ema=ema, ignore_keys=(), load_only_unet=False, keep_dims=None
    )
    if training.ckpt_check:
        check_claims(experiment.task.contradictions(path), path)
    params, mutable, absent = experiment.task.load_released(
        abstract.params, abstract.mutable, path, training
    )
    unknown = [name for name in absent if name.startswith("conditioner/")]
    if unknown:
        raise ValueError(f"{path} cannot hold {', '.join(unknown)}, which the config trains")
    frozen = make_frozen(experiment, path)
    if experiment.task.first_params is not None:
        params = experiment.task.first_params(params, frozen)
    if any(_is_abstract(leaf) for leaf in jax.tree.leaves((params, mutable))):
        initial = experiment.init_state()
        params, mutable = jax.tree.map(
            lambda leaf, own: own if _is_abstract(leaf) else leaf,
            (params, mutable),
            (initial.params, initial.mutable),
        )
    return Trained(params, mutable, frozen), absent


def first_state(experiment: Experiment, state: TrainState, frozen: PyTree) -> TrainState:
    """Begin a new run with what Task.first_params gives, and its average with the same.

    The state shares no memory with `frozen`, which training keeps when it donates the state.
    """
    first_params = experiment.task.first_params
    if first_params is not None:
        state = with_params(experiment, state, first_params(state.params, frozen))
    return owned(state, frozen)


def with_params(
    experiment: Experiment, state: TrainState, params: PyTree, mutable: PyTree | None = None
) -> TrainState:
    """Put parameters in place of the initial ones; average and optimizer start from them."""
    opt_state = restarted(state.opt_state, params, experiment.task.init_optimizer)
    mutable = state.mutable if mutable is None else mutable
    return state._replace(params=params, mutable=mutable, opt_state=opt_state)


def _load_native(experiment: Experiment, path: str | os.PathLike, ema: bool) -> Trained:
    """Read all of a native file, the averages in place of what is averaged if ema says so."""
    weights = open_weights(os.path.expanduser(path))
    abstract, frozen = experiment.abstract_state(), experiment.frozen_constants()
    read = functools.partial(
        import_tree, weights=weights, nonfinite=not experiment.training.ckpt_check
    )
    params = read(abstract.params, prefix="params/")
    if ema:
        if not any(name.startswith("ema/") for name in weights.tensors):
            raise ValueError(f"{path} has no averages (EMA) beside its weights; leave ema out")
        params |= read(experiment.task.averaged_part(abstract.params), prefix="ema/")
    held = frozen_weights(experiment, experiment.abstract_frozen())
    return Trained(
        params,
        read(abstract.mutable, prefix="mutable/"),
        frozen | read(held, prefix="frozen/"),
    )


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def frozen_weights(experiment: Experiment, frozen: PyTree) -> PyTree:
    """Return frozen without the constants, which the config alone decides."""
    return _weights_of(frozen, experiment.task.constants)


def _weights_of(frozen: PyTree, constants: Mapping[str, Any]) -> PyTree:
    return {name: value for name, value in frozen.items() if name not in constants}
