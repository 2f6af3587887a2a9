"""One run from its folder to its last checkpoint: open everything, train, close, test."""

import contextlib
import io
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from diffusion_jax.convert.weights.native import read_about
from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment import make_experiment
from diffusion_jax.experiment.config.files import ConfigFile
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.files.weights import is_released
from diffusion_jax.runs import folder, identity
from diffusion_jax.runs.beginning.first_row import check_inputs
from diffusion_jax.runs.beginning.first_weights import first_weights
from diffusion_jax.runs.beginning.prior import with_prior
from diffusion_jax.runs.beginning.start import Start, plan_start
from diffusion_jax.runs.comparison import leaves, to_plain
from diffusion_jax.runs.drawing.prompt_pictures import check_prompts
from diffusion_jax.runs.facts import record_start
from diffusion_jax.runs.hooks import Watched, build_hooks
from diffusion_jax.runs.latent_cache import CachedTraining, train_from_cache
from diffusion_jax.runs.measuring.evaluation import build_evaluate
from diffusion_jax.runs.weights import (
    first_state,
    holds_frozen,
    run_frozen,
    start_frozen,
)
from diffusion_jax.train import loop
from diffusion_jax.train.checkpoints.reading import resolve_checkpoint, restore_state
from diffusion_jax.train.checkpoints.saving import Checkpoints, open_checkpoints, state_bytes
from diffusion_jax.train.compiler_options import kept_off_disk
from diffusion_jax.train.hooks.checkpoint import make_rescue, save_state
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
from diffusion_jax.train.wandb_writer import wandb_writer
from diffusion_jax.train.writers import Writer, open_writer
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted

# Reasons to stop after which the same command goes on.
SIGNALS = tuple(number.name for number in STOPS)


# Steps of a schedule whose learning rate is computed before training.
_LOOKED_AT = 100_000


class RunEvent(NamedTuple):
    """What a run has to say: a kind for programs, and a sentence for people.

    kinds: "weights" were taken from train.ckpt_path, something is "changed" since the checkpoint
    that a run goes on from, training "starts", is "compiling", "stopped" early, was "tested", and
    what is "saved" where.
    """

    kind: Literal["weights", "changed", "starts", "compiling", "stopped", "tested", "saved"]
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
    resume: bool | int | str = True,
    change: Sequence[str] | Mapping[str, Any] = (),
    fork: str | os.PathLike | None = None,
    accept_data_change: bool = False,
    on_event: Listener | None = None,
    progress: io.TextIOBase | None = None,
    donate: bool = True,
    test: bool = True,
    config_file: ConfigFile | None = None,
) -> Result:
    """Train a config in a folder, or go on with the run that is in it, then test.

    resume: True goes on from the newest checkpoint in the folder, a number from the checkpoint of
      that step (later ones are set aside, not deleted), "set_aside/8.2" from one that was set
      aside, False refuses a folder that holds a run.
    change: what a run that goes on computes otherwise from here on, {"optimizer.learning_rate":
      1e-4} or ["optimizer.learning_rate=1e-4"]; the run records step, old and new value.
    fork: a run or a checkpoint that a new run in workdir begins from with all its state: optimizer,
      step, averages and place in the data.
    accept_data_change: go on although the data have changed since the checkpoint.
    on_event: is called with a RunEvent whenever there is something to say; nothing is printed.
    progress: where the progress line is written, such as sys.stderr; None writes none.
    donate: False keeps the previous state alive in each step (for debugging).
    config_file: where the config came from (load_config_beside_file); what differs is recorded.

    Everything that can be wrong with config, data and folder is found before the first step is
    compiled. Raises ValueError, FileNotFoundError or OSError in one sentence for bad input, and
    Interrupted (a KeyboardInterrupt) for a signal before the first step or after the last save.
    """
    with handle_signals() as received, interruptible(received):
        place = folder.without_link(pathlib.Path(workdir))
        asked = plan_start(config, place, resume, change, fork)
        return _train_run(
            asked,
            accept_data_change,
            _in_process_0(on_event),
            progress,
            donate,
            test,
            config_file,
            received,
        )


def _train_run(
    asked: Start, accept_data_change, say, progress, donate, test, config_file, received
) -> Result:
    workdir, config = asked.workdir, asked.config
    experiment = make_experiment(config)
    folder.check(workdir, config, asked.named)
    asked.check()
    abstract = experiment.check()
    check_learning_rate(experiment.task.lr_at, experiment.training.num_steps)
    experiment = asked.with_data(experiment)
    check_sources(experiment, asked)
    data = open_data(experiment, asked.home)
    made = identity.made_from(
        config,
        seed=experiment.seed,
        class_names=list(data.class_names),
        data=identity.fingerprints(experiment.data),
    )
    identity.agree({"data": made["data"]})
    asked.check_data(made["data"], accept_data_change)
    with contextlib.ExitStack() as stack:
        new = asked.directory is None
        stack.enter_context(folder.claim_for_all(workdir, config, asked.named, save=new))
        checkpoints = open_checkpoints(
            workdir / "checkpoints",
            needed_bytes=state_bytes(abstract),
            **experiment.hooks.checkpoints,
        )
        stack.callback(checkpoints.close)
        state, scores, made = start(experiment, abstract, checkpoints, asked, made, say)
        first_step = int(state.step)
        record_start(workdir, made, config, step=first_step, config_file=config_file)
        writer = run_writer(experiment, workdir, config, first_step)
        stack.callback(writer.close)
        announce(experiment, state, data, workdir, writer, say)
        with watch_hangs(**experiment.hooks.hooks["hang"][0]) as hang:
            frozen = _frozen(experiment, asked, data)
            state = first_state(experiment, state, frozen) if new else state
            watched = Watched(
                workdir=workdir,
                writer=writer,
                checkpoints=checkpoints,
                metadata=made,
                scores=scores,
                frozen=frozen,
                validation_batches=data.validation,
                class_names=data.class_names,
                signals=received,
                hang=hang,
                progress=progress,
                with_images=None if data.cached is None else data.cached.with_images,
            )
            step_fn = _jit_step(experiment, abstract, donate)
            hooks = build_hooks(experiment, watched)
            batches = _batches(experiment, asked, data, state, frozen).iterate(first_step)
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


def _jit_step(experiment: Experiment, abstract: TrainState, donate: bool) -> Callable:
    step = jit_train_step(experiment.train_step, abstract, donate=donate)
    return kept_off_disk(step, experiment.mesh)


def _in_process_0(on_event: Listener | None) -> Listener:
    if on_event is None or jax.process_index() != 0:
        return lambda event: None
    return on_event


def check_learning_rate(lr_at: Callable, count: int) -> None:
    """Raise ValueError when the last of `count` steps have a learning rate of 0: a waste of time.

    A schedule may reach 0 at its last step; float32 rounds a long one to 0 a little before.
    """
    steps = np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT)).astype(int))
    moving = steps[np.asarray(jax.vmap(lr_at)(jnp.asarray(steps))) != 0]
    zeros = count - 1 - int(moving[-1]) if len(moving) else count
    if zeros > max(1, count // 1000) or zeros == count:
        raise ValueError(
            f"config.lr_schedule gives a learning rate of 0 from step {count - zeros} to the last, "
            f"{count}: nothing would be learned; make the schedule longer, for example "
            f"--config.lr_schedule.decay_steps={count}"
        )


def _frozen(experiment: Experiment, asked: Start, data: Opened) -> PyTree:
    given = None if data.cached is None else data.cached.frozen
    if given is None and asked.home != asked.workdir:
        given = run_frozen(experiment, asked.home)
    first_batch = lambda: next(data.train.iterate(0))  # noqa: E731
    frozen = start_frozen(
        experiment,
        asked.workdir,
        given,
        first_batch=first_batch if asked.home == asked.workdir else None,
        going_on=asked.metadata is not None,
    )
    return frozen if data.cached is None else {**frozen, **data.cached.null}


def _batches(
    experiment: Experiment, asked: Start, data: Opened, state: TrainState, frozen: PyTree
) -> Batches:
    given = (experiment, data.train, state.params, frozen, asked.workdir)
    return with_prior(*given, home=asked.home, begins=asked.directory is None)


def open_data(experiment: Experiment, workdir: pathlib.Path) -> Opened:
    """Open the splits that training reads.

    The training split comes from the latent cache if the config has one, which is made or finished
    now.

    Raises ValueError when its labels do not fit the model's classes, when it lacks what an embedder
    reads, for prompts in hooks.prompts that cannot be drawn, and when the cache was made from
    something else or is damaged.
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
    check_inputs(experiment, source)
    check_prompts(experiment, names)
    validation, test = (
        None if data.splits[role] is None else experiment.eval_batches(role)
        for role in ("validation", "test")
    )
    if experiment.latent_cache is not None:
        cached = train_from_cache(experiment, source, workdir)
        return Opened(cached.batches, validation, test, names, cached)
    return Opened(experiment.train_batches(source), validation, test, names)


def check_sources(experiment: Experiment, asked: Start) -> None:
    """Find out now whether the weights are there that a new run starts from.

    A run that goes on holds them itself.
    Raises ValueError or FileNotFoundError, naming the option and the path.
    """
    if asked.metadata is not None and holds_frozen(experiment, asked.home):
        return
    path = experiment.training.ckpt_path
    if path is not None and not is_released(path) and read_about(path) is None:
        resolve_checkpoint(path)
    experiment.task.check_sources()


def start(
    experiment: Experiment,
    abstract: TrainState,
    checkpoints: Checkpoints,
    asked: Start,
    made: Mapping[str, Any],
    say: Listener,
) -> tuple[TrainState, Scores, dict[str, Any]]:
    """Make the initial state or restore a checkpoint -> (state, scores, metadata of what follows).

    The folder of the run keeps its config only now that the checkpoint was read and found to fit.
    """
    if asked.directory is None:
        state, scores = _initial(experiment, say)
        return state, scores, dict(made)
    if asked.is_fork:
        state, metadata = restore_state(asked.directory, abstract, asked.step)
    else:
        state, metadata = checkpoints.go_back(abstract, asked.step)
    step, scores = int(state.step), scores_from(metadata)
    changes = asked.changes(metadata, step)
    made = {**made, "changes": changes, "forked_from": asked.forked_from}
    lines = [f"{c['path']} = {c['new']!r} (was {c['old']!r})" for c in changes if c["step"] == step]
    lines += identity.code_differences(metadata, made)
    if lines:
        say(RunEvent("changed", f"from step {step} on, changed: {'; '.join(lines)}"))
    if asked.is_fork:
        save_state(checkpoints, made, scores, step, state)
        checkpoints.wait()
    if jax.process_index() == 0:
        folder.save_config(asked.workdir, asked.config, changes, asked.forked_from)
    return state, scores, made


def _initial(experiment: Experiment, say: Listener) -> tuple[TrainState, Scores]:
    """Make the initial state, from train.ckpt_path if the config names one."""
    state = experiment.init_state()
    if experiment.task.first_params is not None:
        return state, {}
    state, lines = first_weights(experiment, state)
    for text in lines:
        say(RunEvent("weights", text))
    return state, {}


def run_writer(
    experiment: Experiment, workdir: pathlib.Path, config: ml_collections.ConfigDict, step: int
) -> Writer:
    """Open everything that metrics of a run go to, and show its config there."""
    values = leaves(to_plain(config))
    asked, more = experiment.hooks.hooks, []
    if "wandb" in asked:
        more = [wandb_writer(workdir, values, **asked["wandb"][0])]
    monitor = values["checkpoint.monitor"] if "checkpoint.monitor" in values else None
    writer = open_writer(workdir, *more, resume_step=step, monitor=monitor)
    writer.write_hparams(values)
    return writer


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
    images = counted(data.train.num_examples, "training image", "training images")
    position = f"continues at step {int(state.step)}" if int(state.step) else "starts"
    say(
        RunEvent(
            "starts",
            f"{workdir} {position}: {count:,} parameters, see {workdir / 'parameters.txt'}\n"
            f"{images} of {experiment.data.name}, mesh {mesh} of {jax.default_backend()}",
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
    names = [name for name in sorted(found) if name.endswith(tuple(endings))]
    losses = ", ".join(f"{name} {found[name]:.4f}" for name in names)
    images = counted(batches.num_examples, "image", "images")
    say(RunEvent("tested", f"test split, {images}: {losses}"))
    return found
