"""One run from its folder to its last checkpoint: open everything, train, close, test."""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import ml_collections

from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.weights import is_released
from diffusion_jax.runs import folder
from diffusion_jax.runs.evaluation import build_evaluate
from diffusion_jax.runs.hooks import Watched, build_hooks
from diffusion_jax.runs.latent_cache import CachedTraining, train_from_cache
from diffusion_jax.runs.weights import start_frozen
from diffusion_jax.train import loop
from diffusion_jax.train.checkpoints.reading import resolve_checkpoint, saved_steps
from diffusion_jax.train.checkpoints.saving import (
    Checkpoints,
    open_checkpoints,
    set_aside_later,
    state_bytes,
)
from diffusion_jax.train.checkpoints.warm_start import warm_start, warm_start_mutable
from diffusion_jax.train.ema import has_ema, reset_ema
from diffusion_jax.train.hooks.checkpoint import make_rescue
from diffusion_jax.train.hooks.hang import watch_hangs
from diffusion_jax.train.hooks.overview import overview
from diffusion_jax.train.hooks.received import (
    STOPS,
    handle_signals,
    interruptible,
    interruptible_batches,
)
from diffusion_jax.train.hooks.validation import Scores, scores_from
from diffusion_jax.train.loop import Stop
from diffusion_jax.train.state import TrainState
from diffusion_jax.train.step import jit_train_step
from diffusion_jax.train.writers import Writer, open_writer
from diffusion_jax.types import PyTree

# Reasons to stop after which the same command goes on.
SIGNALS = tuple(number.name for number in STOPS)


class RunEvent(NamedTuple):
    """What a run has to say: a kind for programs, and a sentence for people.

    kinds: "weights" were taken from train.ckpt_path, training "starts", is "compiling", "stopped"
    early, was "tested", and what is "saved" where.
    """

    kind: Literal["weights", "starts", "compiling", "stopped", "tested", "saved"]
    text: str


Listener: TypeAlias = Callable[[RunEvent], None]


class Result(NamedTuple):
    """What a run came to.

    state: the last TrainState, on its devices. metrics: the losses of the last validation and of
    the test split, by name. step: updates made in all. stopped: why training ended before
    train.num_steps, or None. experiment: what the config described.
    """

    state: TrainState
    metrics: dict[str, float]
    step: int
    stopped: Stop | None
    experiment: Experiment


class Opened(NamedTuple):
    """The data of a run. cached: what comes with batches out of a latent cache."""

    train: Batches
    validation: Batches | None
    test: Batches | None
    class_names: tuple[str, ...]
    cached: CachedTraining | None = None


def train_run(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    resume: bool | int = True,
    on_event: Listener | None = None,
    progress: io.TextIOBase | None = None,
    donate: bool = True,
    test: bool = True,
) -> Result:
    """Train a config in a folder, or go on with the run that is in it, then test.

    resume: True goes on from the newest checkpoint in the folder, a number from the checkpoint of
      that step (later ones are set aside, not deleted), False refuses a folder that holds a run.
    on_event: is called with a RunEvent whenever there is something to say; nothing is printed.
    progress: where the progress line is written, such as sys.stderr; None writes none.
    donate: False keeps the previous state alive in each step (for debugging).

    Everything that can be wrong with config, data and folder is found before the first step is
    compiled. Raises ValueError, FileNotFoundError or OSError in one sentence for bad input, and
    Interrupted (a KeyboardInterrupt) for a signal before the first step or after the last save.
    """
    with handle_signals() as received, interruptible(received):
        return _train_run(
            config, pathlib.Path(workdir), resume, on_event, progress, donate, test, received
        )


def _train_run(config, workdir, resume, on_event, progress, donate, test, received) -> Result:
    say = _in_process_0(on_event)
    if resume is False and folder.has_run(workdir):
        raise ValueError(f"resume = False, but {workdir} holds a run; choose another folder")
    experiment = make_experiment(config)
    folder.check(workdir, config)
    abstract = experiment.check()
    check_sources(experiment)
    data = open_data(experiment, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(folder.claim_for_all(workdir, config))
        from_step = None if isinstance(resume, bool) else resume
        checkpoints = _open_checkpoints(experiment, workdir, from_step, state_bytes(abstract))
        stack.callback(checkpoints.close)
        state, scores = start(experiment, abstract, checkpoints, say)
        first_step = int(state.step)
        _check_learning_rate(experiment, first_step)
        writer = open_writer(workdir, resume_step=first_step)
        stack.callback(writer.close)
        announce(experiment, state, data, workdir, writer, say)
        with watch_hangs(**experiment.hooks.hooks["hang"][0]) as hang:
            watched = Watched(
                workdir=workdir,
                writer=writer,
                checkpoints=checkpoints,
                metadata=_metadata(experiment, config),
                scores=scores,
                frozen=_frozen(experiment, workdir, data),
                validation_batches=data.validation,
                class_names=data.class_names,
                signals=received,
                hang=hang,
                progress=progress,
                with_images=None if data.cached is None else data.cached.with_images,
            )
            step_fn = jit_train_step(experiment.train_step, abstract, donate=donate)
            hooks = build_hooks(experiment, watched)
            batches = data.train.iterate(first_step)
            received.interruptible = False  # from here on, a signal waits for the save
            state, stop = loop.train(
                state,
                lambda state, batch: step_fn(state, experiment.to_devices(batch), watched.frozen),
                # several processes stop together, see signal_hook
                batches if jax.process_count() > 1 else interruptible_batches(batches, received),
                hooks,
                num_steps=experiment.training.num_steps,
                rescue=make_rescue(checkpoints, watched.metadata, scores, first_step=first_step),
            )
        checkpoints.wait()
        if stop is not None and stop.reason in SIGNALS:
            received.clear()  # one signal is enough
        with interruptible(received):
            return _finish(experiment, state, stop, watched, data.test if test else None, say)


def _metadata(experiment: Experiment, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Name what a checkpoint was made from."""
    return {
        "config": folder.to_plain(config),
        "revision": folder.git_revision(),
        "seed": experiment.seed,
    }


def _in_process_0(on_event: Listener | None) -> Listener:
    if on_event is None or jax.process_index() != 0:
        return lambda event: None
    return on_event


def _check_learning_rate(experiment: Experiment, first_step: int) -> None:
    last_step, lr_at = experiment.training.num_steps - 1, experiment.task.lr_at
    if first_step <= last_step and lr_at(first_step) == lr_at(last_step) == 0:
        raise ValueError(
            f"config.lr_schedule gives a learning rate of 0 from step {first_step} to the last, "
            f"{last_step + 1}: nothing would be learned; make the schedule longer, for example "
            f"--config.lr_schedule.decay_steps={last_step + 1}"
        )


def _open_checkpoints(
    experiment: Experiment, workdir: pathlib.Path, from_step: int | None, needed_bytes: int
) -> Checkpoints:
    directory = workdir / "checkpoints"
    if from_step is not None and jax.process_index() == 0:
        set_aside_later(directory, from_step)
    return open_checkpoints(directory, needed_bytes=needed_bytes, **experiment.hooks.checkpoints)


def _frozen(experiment: Experiment, workdir: pathlib.Path, data: Opened) -> PyTree:
    given = None if data.cached is None else data.cached.frozen
    frozen = start_frozen(
        experiment, workdir, given, first_batch=lambda: next(data.train.iterate(0))
    )
    return frozen if data.cached is None else {**frozen, **data.cached.null}


def open_data(experiment: Experiment, workdir: pathlib.Path) -> Opened:
    """Open the splits that training reads.

    The training split comes from the latent cache if the config has one, which is made or finished
    now.

    Raises ValueError when its labels do not fit the model's classes, and when the cache was made
    from something else or is damaged.
    """
    data = experiment.data
    source = data.source("train")
    names = data.class_names(source)
    for name, embedder in experiment.task.embedders.items():
        if embedder.num_classes is not None and len(names) > embedder.num_classes:
            raise ValueError(
                f"config.conditioning.embedders.{name}.num_classes = {embedder.num_classes} is too "
                f"few: the data set {data.name!r} has {len(names)} classes"
            )
    validation, test = (
        None if data.splits[role] is None else experiment.eval_batches(role)
        for role in ("validation", "test")
    )
    if experiment.latent_cache is not None:
        cached = train_from_cache(experiment, source, workdir)
        return Opened(cached.batches, validation, test, names, cached)
    return Opened(experiment.train_batches(source), validation, test, names)


def check_sources(experiment: Experiment) -> None:
    """Find out now whether the weights are there that the run starts from.

    Raises ValueError or FileNotFoundError, naming the option and the path.
    """
    path = experiment.training.ckpt_path
    if path is not None and not is_released(path):
        resolve_checkpoint(path)
    experiment.task.check_sources()


def start(
    experiment: Experiment, abstract: TrainState, checkpoints: Checkpoints, say: Listener
) -> tuple[TrainState, Scores]:
    """Restore the newest checkpoint, or make the initial state, from train.ckpt_path if given."""
    if saved_steps(checkpoints.directory):
        state, metadata = checkpoints.restore(abstract)
        return state, scores_from(metadata)
    state = experiment.init_state()
    if experiment.training.ckpt_path is None:
        return state, {}
    state = _load_start(experiment, state, experiment.training.ckpt_path, say)
    # The average starts from the loaded weights; upstream leaves it at the random ones it was made
    # with.
    opt_state = state.opt_state
    averaged = experiment.task.averaged_part(state.params)
    opt_state = reset_ema(opt_state, averaged) if has_ema(opt_state) else opt_state
    return state._replace(opt_state=opt_state), {}


def _load_start(experiment: Experiment, state: TrainState, path: str, say: Listener) -> TrainState:
    """Take the parameters of train.ckpt_path, a run or a released file; say what was not taken."""
    training = experiment.training
    if is_released(path):
        params, mutable, absent = experiment.task.load_released(
            state.params, state.mutable, path, training
        )
        lists = {"not loaded": absent}
    else:
        loaded = warm_start(
            state.params,
            path,
            ignore_keys=training.ignore_keys,
            load_only_unet=training.load_only_unet,
            ema=training.ckpt_ema,
        )
        params, mutable = loaded.params, state.mutable
        if jax.tree.leaves(mutable):
            mutable = warm_start_mutable(mutable, path, ignore_keys=training.ignore_keys)
        lists = {"not loaded": loaded.not_loaded, "not used": loaded.unused}
    for what, names in lists.items():
        text = f"{path}: {len(names)} parameters {what}" + "".join(f"\n  {n}" for n in names)
        say(RunEvent("weights", text))
    return state._replace(params=params, mutable=mutable)


def announce(
    experiment: Experiment,
    state: TrainState,
    data: Opened,
    workdir: pathlib.Path,
    writer: Writer,
    say: Listener,
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
    say(
        RunEvent(
            "starts",
            f"{workdir} {position}: {count:,} parameters, see {workdir / 'parameters.txt'}\n"
            f"{data.train.num_examples:,} training images of {experiment.data.name}, "
            f"mesh {mesh} of {jax.default_backend()}",
        )
    )
    say(RunEvent("compiling", "compiling the training step"))


def _finish(
    experiment: Experiment,
    state: TrainState,
    stop: Stop | None,
    watched: Watched,
    test: Batches | None,
    say: Listener,
) -> Result:
    """Say how training ended and, unless a signal or a NaN ended it, look at the test split."""
    step, scores = int(state.step), watched.scores
    found = dict(scores[max(scores)]) if scores else {}
    if stop is not None:
        say(RunEvent("stopped", f"stopped at step {step}: {stop.reason}"))
    if stop is None or (stop.save and stop.reason not in SIGNALS):
        if test is not None:
            found |= _test(experiment, state, watched, test, say)
        say(RunEvent("saved", f"step {step} is saved in {watched.checkpoints.directory}"))
    return Result(state, found, step, stop, experiment)


def _test(
    experiment: Experiment, state: TrainState, watched: Watched, batches: Batches, say: Listener
) -> dict[str, float]:
    found = build_evaluate(experiment, watched.frozen, batches, prefix="test")(state)
    watched.writer.write_scalars(int(state.step), found)
    endings = [name + end for name in experiment.task.headline for end in ("", "_ema")]
    told = [name for name in sorted(found) if name.endswith(tuple(endings))]
    losses = ", ".join(f"{name} {found[name]:.4f}" for name in told)
    say(RunEvent("tested", f"test split, {batches.num_examples} images: {losses}"))
    return found
