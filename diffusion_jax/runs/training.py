"""One run from its folder to its last checkpoint: open everything, train, close everything,
test."""

import contextlib
import pathlib
import re
from typing import Any, NamedTuple

import jax
import ml_collections

from diffusion_jax.data.batches import Batches
from diffusion_jax.devices.processes import say
from diffusion_jax.experiment import Experiment
from diffusion_jax.experiment.autoencoding import is_first_stage
from diffusion_jax.experiment.first_stage_weights import load_first_stage
from diffusion_jax.experiment.hooks import HookOptions, bind_hooks
from diffusion_jax.experiment.weights import (
    check_frozen_sources,
    is_released,
    load_released,
    open_part,
    start_frozen,
)
from diffusion_jax.runs import folder as run_folder
from diffusion_jax.runs.evaluation import build_evaluate
from diffusion_jax.runs.folder import claim_for_all
from diffusion_jax.runs.hooks import Watched, build_hooks
from diffusion_jax.runs.latent_cache import CachedTraining, train_from_cache
from diffusion_jax.train import loop
from diffusion_jax.train.checkpoints.saving import (
    Checkpoints,
    open_checkpoints,
    resolve_checkpoint,
    saved_steps,
    set_aside_later,
    state_bytes,
)
from diffusion_jax.train.checkpoints.warm_start import warm_start, warm_start_mutable
from diffusion_jax.train.ema import has_ema, reset_ema
from diffusion_jax.train.hooks.checkpoint import make_rescue
from diffusion_jax.train.hooks.hang import watch_hangs
from diffusion_jax.train.hooks.overview import overview
from diffusion_jax.train.hooks.signals import STOPS, handle_signals
from diffusion_jax.train.hooks.validation import Scores, scores_from
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.step import jit_train_step
from diffusion_jax.train.writers import Writer, open_writer
from diffusion_jax.types import PyTree

EXIT_NOT_A_NUMBER = 3  # a metric was NaN or infinite; the message names the last good checkpoint
EXIT_SIGNAL = (
    75  # stopped by SIGTERM or Ctrl-C and saved: the same command goes on (sysexits.h, EX_TEMPFAIL)
)
SIGNALS = tuple(number.name for number in STOPS)


class Opened(NamedTuple):
    """The data of a run. cached: what comes with batches out of a latent cache."""

    train: Batches
    validation: Batches | None
    test: Batches | None
    class_names: tuple[str, ...]
    cached: CachedTraining | None = None


def train_run(
    experiment: Experiment,
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    *,
    from_step: int | None = None,
    donate: bool = True,
    test: bool = True,
) -> int:
    """Train in a folder, or go on with what is there, then test; return the exit code.

    from_step: go on from this checkpoint instead of the newest; later ones are set aside, not
    deleted. Everything that can be wrong with config, data and folder is found before the first
    step is compiled.
    """
    run_folder.check(workdir, config)
    abstract = experiment.check()
    check_sources(experiment)
    options = bind_hooks(experiment.sections)
    data = open_data(experiment, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claim_for_all(workdir, config))
        checkpoints = _open_checkpoints(workdir, from_step, options, state_bytes(abstract))
        stack.callback(checkpoints.close)
        state, scores = start(experiment, abstract, checkpoints)
        first_step = int(state.step)
        _check_learning_rate(experiment, first_step)
        writer = open_writer(workdir, resume_step=first_step)
        stack.callback(writer.close)
        announce(experiment, state, data, workdir, writer)
        with handle_signals() as received, watch_hangs(**options.hooks["hang"][0]) as hang:
            watched = Watched(
                workdir=workdir,
                writer=writer,
                checkpoints=checkpoints,
                metadata={
                    "config": run_folder.to_plain(config),
                    "revision": run_folder.git_revision(),
                    "seed": experiment.seed,
                },
                scores=scores,
                frozen=_frozen(experiment, workdir, data),
                validation_batches=data.validation,
                class_names=data.class_names,
                signals=received,
                hang=hang,
                with_images=None if data.cached is None else data.cached.with_images,
            )
            step_fn = jit_train_step(experiment.train_step, abstract, donate=donate)
            state, stop = loop.train(
                state,
                lambda state, batch: step_fn(state, experiment.to_devices(batch), watched.frozen),
                data.train.iterate(first_step),
                build_hooks(experiment, options, watched),
                num_steps=experiment.training.num_steps,
                rescue=make_rescue(checkpoints, watched.metadata, scores, first_step=first_step),
            )
        checkpoints.wait()
        return finish(experiment, state, stop, watched, data, test=test)


def _check_learning_rate(experiment: Experiment, first_step: int) -> None:
    last_step = experiment.training.num_steps - 1
    if first_step <= last_step and experiment.lr_at(first_step) == experiment.lr_at(last_step) == 0:
        raise ValueError(
            f"config.lr_schedule gives a learning rate of 0 from step {first_step} to the last, "
            f"{last_step + 1}: nothing would be learned; make the schedule longer, for example "
            f"--config.lr_schedule.decay_steps={last_step + 1}"
        )


def _open_checkpoints(
    workdir: pathlib.Path, from_step: int | None, options: HookOptions, needed_bytes: int
) -> Checkpoints:
    directory = workdir / "checkpoints"
    if from_step is not None and jax.process_index() == 0:
        set_aside_later(directory, from_step)
    return open_checkpoints(directory, needed_bytes=needed_bytes, **options.checkpoints)


def _frozen(experiment: Experiment, workdir: pathlib.Path, data: Opened) -> PyTree:
    given = None if data.cached is None else data.cached.frozen
    frozen = start_frozen(
        experiment, workdir, given, first_batch=lambda: next(data.train.iterate(0))
    )
    return frozen if data.cached is None else {**frozen, **data.cached.null}


def open_data(experiment: Experiment, workdir: pathlib.Path) -> Opened:
    """Open the splits that training reads, the first from the latent cache if the config has one,
    which is made or finished now.

    Raises ValueError when its labels do not fit the model's classes, and when the cache was made
    from something else or is damaged.
    """
    data, training = experiment.data, experiment.training
    source = data.source("train")
    names = data.class_names(source)
    for name, embedder in experiment.task.embedders.items():
        if embedder.num_classes is not None and len(names) > embedder.num_classes:
            raise ValueError(
                f"config.conditioning.embedders.{name}.num_classes = {embedder.num_classes} is too "
                f"few: the data set {data.name!r} has {len(names)} classes"
            )
    validation, test = (
        None
        if data.splits[role] is None
        else data.eval_batches(data.source(role), batch_size=training.batch_size)
        for role in ("validation", "test")
    )
    if experiment.latent_cache is not None:
        cached = train_from_cache(experiment, source, workdir)
        return Opened(cached.batches, validation, test, names, cached)
    train = data.train_batches(source, batch_size=training.batch_size, seed=experiment.seed)
    return Opened(train, validation, test, names)


def start(
    experiment: Experiment, abstract: TrainState, checkpoints: Checkpoints
) -> tuple[TrainState, Scores]:
    """Restore the newest checkpoint of the run, or make the initial state, warm if the config says
    so."""
    if saved_steps(checkpoints.directory):
        state, metadata = checkpoints.restore(abstract)
        return state, scores_from(metadata)
    state, training = experiment.init_state(), experiment.training
    if training.ckpt_path is None:
        return state, {}
    state = load_start(experiment, state)
    # The average starts from the loaded weights; upstream leaves it at the random ones it was made
    # with.
    opt_state = state.opt_state
    averaged = experiment.task.averaged_part(state.params)
    opt_state = reset_ema(opt_state, averaged) if has_ema(opt_state) else opt_state
    return state._replace(opt_state=opt_state), {}


def check_sources(experiment: Experiment) -> None:
    """Find out now whether the weights are there that the run starts from.

    Raises ValueError or FileNotFoundError, naming the option and the path.
    """
    path = experiment.training.ckpt_path
    if path is not None and is_released(path):
        open_part(path, "vae" if is_first_stage(experiment.sections) else "unet")
    elif path is not None:
        resolve_checkpoint(path)
    check_frozen_sources(experiment)


def load_start(experiment: Experiment, state: TrainState) -> TrainState:
    """Take the parameters of train.ckpt_path, a run or a released file, and the mutable collections
    of a first stage; say what was not taken."""
    training = experiment.training
    path = training.ckpt_path
    assert path is not None
    options: dict[str, Any] = {"ignore_keys": training.ignore_keys, "ema": training.ckpt_ema}
    first_stage = is_first_stage(experiment.sections)
    if is_released(path) and first_stage:
        state, absent = load_first_stage(state, open_part(path, "vae"), **options)
        say(f"{path}: {len(absent)} parts not loaded" + "".join(f"\n  {name}" for name in absent))
        return state
    options["load_only_unet"] = training.load_only_unet
    if is_released(path):
        keep_dims = training.keep_dims
        loaded = load_released(experiment, state.params, path, **options, keep_dims=keep_dims)
        lists = [("not loaded", loaded.not_loaded)]
    else:
        loaded = warm_start(state.params, path, **options)
        lists = [("not loaded", loaded.not_loaded), ("not used", loaded.unused)]
        if first_stage:
            ignore = training.ignore_keys
            mutable = warm_start_mutable(state.mutable, path, ignore_keys=ignore)
            state = state._replace(mutable=mutable)
    for what, names in lists:
        say(f"{path}: {len(names)} parameters {what}" + "".join(f"\n  {n}" for n in names))
    return state._replace(params=loaded.params)


def announce(
    experiment: Experiment, state: TrainState, data: Opened, workdir: pathlib.Path, writer: Writer
) -> None:
    """Say what is about to happen, and write the table of parameters."""
    if jax.process_index() != 0:
        return
    table = overview(state.params)
    (workdir / "parameters.txt").write_text(table + "\n")
    writer.write_texts(int(state.step), {"parameters": f"```\n{table}\n```"})
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    mesh = " x ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())
    position = f"continues at step {int(state.step)}" if int(state.step) else "starts"
    print(f"{workdir} {position}: {count:,} parameters, see {workdir / 'parameters.txt'}")
    print(
        f"{data.train.num_examples:,} training images of {experiment.data.name}, "
        f"mesh {mesh} of {jax.default_backend()}"
    )
    print("compiling the training step", flush=True)


def finish(
    experiment: Experiment,
    state: TrainState,
    stop: loop.Stop | None,
    watched: Watched,
    data: Opened,
    *,
    test: bool,
) -> int:
    """Say how training ended, test unless told not to, and choose the exit code."""
    step = int(state.step)
    if stop is not None:
        say(f"stopped at step {step}: {stop.reason}")
        if not stop.save:
            return EXIT_NOT_A_NUMBER
        if stop.reason in SIGNALS:
            say(f"saved; the same command, or --resume={watched.workdir}, goes on from here")
            return EXIT_SIGNAL
    if test and data.test is not None:
        _test(experiment, state, watched, data.test)
    if jax.process_index() == 0:
        print(f"step {step} is saved in {watched.checkpoints.directory}")
        if not is_first_stage(experiment.sections):
            print(f"draw images: python launch.py sample --workdir={watched.workdir}")
    return 0


def _test(experiment: Experiment, state: TrainState, watched: Watched, batches: Batches) -> None:
    found = build_evaluate(experiment, watched.frozen, batches, prefix="test")(state)
    watched.writer.write_scalars(int(state.step), found)
    names = [name for name in sorted(found) if re.search("loss_simple|loss_x0|loss/rec", name)]
    losses = ", ".join(f"{name} {found[name]:.4f}" for name in names)
    if jax.process_index() == 0:
        print(f"test split, {batches.num_examples} images: {losses}")
