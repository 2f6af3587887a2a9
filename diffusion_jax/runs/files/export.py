"""Weights between runs, single files and folders of diffusers."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import jax
import ml_collections

from diffusion_jax.convert.weights.exporting import check_target
from diffusion_jax.convert.weights.lora_names import LAYOUTS, LoraLayout
from diffusion_jax.convert.yaml.from_yaml import config_from_yaml
from diffusion_jax.experiment import Experiment, make_experiment
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.experiment.files.lora import with_loras
from diffusion_jax.experiment.task import Trained
from diffusion_jax.runs import folder
from diffusion_jax.runs.beginning.start import known_of
from diffusion_jax.runs.comparison import with_whole_paths
from diffusion_jax.runs.files.lora import convert_lora
from diffusion_jax.runs.files.native import find_about, write_native
from diffusion_jax.runs.files.released import config_for
from diffusion_jax.runs.files.stablehlo import write_stablehlo
from diffusion_jax.runs.identity import made_from
from diffusion_jax.runs.weights import (
    frozen_weights,
    load_checkpoint_file,
    load_trained,
    load_trained_params,
    start_frozen,
    with_params,
)
from diffusion_jax.train.checkpoints.saving import open_checkpoints, state_bytes
from diffusion_jax.wording import counted

Form: TypeAlias = Literal["safetensors", "native", "diffusers", "run", "stablehlo"] | LoraLayout


def convert_weights(
    source: str | os.PathLike,
    target: str | os.PathLike,
    form: Form,
    *,
    config: ml_collections.ConfigDict | None = None,
    dtype: Any = None,
    step: int | None = None,
    raw: bool = False,
    with_ema: bool = False,
    ema: bool = False,
    overrides: Sequence[str] = (),
    nonfinite: bool = False,
    loras: Mapping[str | os.PathLike, float] = MappingProxyType({}),
    base: str | os.PathLike | None = None,
    batch_size: int = 1,
) -> list[str]:
    """Convert a run, or a released file that config describes -> sentences about what was done.

    config: None is the run's own, or the shipped config that describes the file.
    form: what to write at target, which must not exist. "safetensors" is the layout of released
    files that fits, and "native" where none does; a native file needs no config, see runs.native.
    dtype: of the file, as it is by default.
    step, raw, with_ema: of a run, which checkpoint, its raw weights in place of the averages, or
    its raw weights with the averages beside them; overrides of its config, see load_run_config.
    ema: the averages of a training file (.ckpt). nonfinite: NaN and infinite numbers are written,
    too. loras: files to add to the weights, each times a number. base: see runs.lora.convert_lora,
    which writes the forms "peft" and "kohya". batch_size: how many images a program ("stablehlo")
    draws, see runs.stablehlo.
    Raises ValueError or FileNotFoundError for what does not fit; nothing is overwritten.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    is_run = folder.has_run(source)
    _check(source, target, form, is_run, with_ema, base, is_described=is_run or config is not None)
    about = find_about(source)
    known = known_of(source, step) if is_run else {} if about is None else about.facts
    if config is None and is_run:
        config = folder.load_run_config(source, overrides)
    config = config_for(source, None, overrides) if config is None else config
    described = with_whole_paths(config)
    if form in LAYOUTS:
        options = {"base": base, "dtype": dtype, "step": step, "raw": raw, "ema": ema}
        return convert_lora(source, target, form, described, is_run=is_run, **options)
    experiment = _build(described, form)
    if is_run:
        trained, lines = _load_run(experiment, source, step, raw, with_ema), []
    else:
        trained, unset = load_checkpoint_file(experiment, source, ema=ema)
        lines = [f"{source} has no {' and no '.join(unset)}: initial values stay"] if unset else []
    trained = _with_loras(experiment, trained, loras)
    written = {"dtype": dtype, "nonfinite": nonfinite}
    layout = None if form == "native" else experiment.task.layout(trained)
    if form == "run":
        write_run(experiment, trained, described, target, known)
    elif form == "native" or (form == "safetensors" and layout is None):
        averaged = is_run and trained.ema is None and not raw
        held = "averages" if averaged or ema else "raw" if about is None else about.weights
        of = known["next_batch"] if "next_batch" in known else about and about.step
        rest = (trained, frozen_weights(experiment, trained.frozen))
        write_native(target, config, *rest, weights=held, step=of, known=known, **written)
        lines.append("layout native: this program reads it without --config")
    elif form == "stablehlo":
        options = {"batch_size": batch_size, "dtype": dtype}
        lines.append(write_stablehlo(experiment, trained, target, **options))
    elif form == "diffusers":
        experiment.task.export_folder(trained, target, **written)
    else:
        layout = experiment.task.export_file(trained, target, **written)
        lines.append(f"layout {layout}")
    return [*lines, f"wrote {target}"]


def _check(
    source: pathlib.Path,
    target: pathlib.Path,
    form: Form,
    is_run: bool,
    with_ema: bool,
    base: str | os.PathLike | None,
    *,
    is_described: bool,
) -> None:
    if base is not None and form not in LAYOUTS:
        raise ValueError(f"--base={base} is for --format={' or '.join(LAYOUTS)}")
    if form in LAYOUTS and base is None and not is_described:
        raise ValueError(f"--from={source} needs --config=, the model that the LoRA is for")
    if target.exists():
        raise ValueError(f"--to={target} exists; choose another name, nothing is overwritten")
    if is_run and form == "run":
        raise ValueError(f"--from={source} is a run already; choose another format")
    if with_ema and not is_run:
        raise ValueError("--with_ema is for runs: a released file has one set of weights")
    check_target(target)


def _with_loras(
    experiment: Experiment, trained: Trained, loras: Mapping[str | os.PathLike, float]
) -> Trained:
    if not loras:
        return trained
    network, weights = experiment.network, (trained.params, trained.frozen)
    params, frozen = with_loras(network, *weights, loras)
    return trained._replace(params=params, frozen=frozen)


def _build(config: ml_collections.ConfigDict, form: Form) -> Experiment:
    """Build an experiment; a program in a file is for one device, whatever the mesh was."""
    if form != "stablehlo":
        return make_experiment(config)
    if "mesh" in config:
        with config.unlocked():
            del config["mesh"]
    return make_experiment(config, devices=jax.devices()[:1])


def _load_run(
    experiment: Experiment, source: pathlib.Path, step: int | None, raw: bool, with_ema: bool
) -> Trained:
    trained = load_trained(experiment, source, step=step, ema=not (raw or with_ema))
    if not with_ema:
        return trained
    averages = load_trained_params(experiment, source, step=step, ema=True)
    return trained._replace(ema=averages)


def convert_yaml(
    source: str | os.PathLike, target: str | os.PathLike
) -> tuple[list[str], str | None]:
    """Convert a YAML config to a config file, and build that -> (sentences, what is wrong or None).

    Raises ValueError or FileNotFoundError for what cannot be converted; nothing is overwritten.
    """
    target = pathlib.Path(target)
    check_target(target)
    converted = config_from_yaml(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(converted.source)
    lines = [f"not mapped: {line}" for line in converted.unmapped]
    lines.append(
        f"wrote {target}; {counted(len(converted.unmapped), 'key was', 'keys were')} not mapped"
    )
    try:
        make_experiment(load_config(str(target))).abstract_state()
    except ValueError as error:
        return lines, str(error)
    return lines, None


def write_run(
    experiment: Experiment,
    trained: Trained,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Make a run that has done no step yet and starts from these weights.

    known: the metadata of a checkpoint or native file that they come from, whose class names stay.
    """
    with folder.claim(workdir, config):
        state = experiment.init_state()
        state = with_params(experiment, state, trained.params, trained.mutable)
        checkpoints = open_checkpoints(workdir / "checkpoints", needed_bytes=state_bytes(state))
        names = {name: known[name] for name in ("class_names",) if known and name in known}
        metadata = {**made_from(config), **names, "next_batch": 0, "scores": {}}
        checkpoints.save(0, state, metadata)
        checkpoints.close()
        start_frozen(experiment, workdir, trained.frozen)
