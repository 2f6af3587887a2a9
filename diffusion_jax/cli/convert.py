"""`python launch.py convert`: weights between runs, single files and diffusers folders; configs
from YAML."""

import argparse
import pathlib

import ml_collections
import numpy as np

from diffusion_jax.cli.convert_run import convert_first_stage, write_run
from diffusion_jax.convert.yaml.from_yaml import config_from_yaml
from diffusion_jax.experiment.autoencoding import is_first_stage
from diffusion_jax.experiment.binding import DTYPES
from diffusion_jax.experiment.config_files import load_config
from diffusion_jax.experiment.export import export_diffusers, export_single_file
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs import folder as run_folder
from diffusion_jax.runs.folder import load_saved_config

FORMATS = ("safetensors", "diffusers", "run")


def run(arguments: argparse.Namespace) -> int:
    """Convert what the flags say; return 0."""
    if arguments.from_yaml:
        return _yaml(arguments)
    if not (arguments.source and arguments.to):
        raise ValueError("give --from=FILE|FOLDER|RUN and --to=..., or --from_yaml=; see --help")
    target = pathlib.Path(arguments.to)
    form = arguments.format or ("safetensors" if target.suffix == ".safetensors" else None)
    if form is None:
        raise ValueError(f"--to={target} is a folder: say --format=diffusers or --format=run")
    if target.exists():
        raise ValueError(f"--to={target} exists; choose another name, nothing is overwritten")
    is_run = run_folder.has_run(pathlib.Path(arguments.source))
    if not is_run and not arguments.config:
        raise ValueError(f"--from={arguments.source} needs --config=, the config that describes it")
    config = None if is_run else load_config(arguments.config, arguments.overrides)
    described = load_saved_config(pathlib.Path(arguments.source)) if config is None else config
    if "model" in described and is_first_stage(described):
        convert_first_stage(arguments, described, target, form, is_run=is_run)
        print(f"wrote {target}")
        return 0
    pipe = _load(arguments, config)
    if form == "run":
        if config is None:
            raise ValueError(f"--from={arguments.source} is a run already; choose another format")
        experiment, state = pipe.experiment, pipe.experiment.init_state()
        state = state._replace(params=pipe.params)
        write_run(experiment, state, pipe.frozen, config, target)
    else:
        _write(arguments, pipe, target, form, is_run)
    print(f"wrote {target}")
    return 0


def _load(arguments: argparse.Namespace, config: ml_collections.ConfigDict | None) -> Pipeline:
    if config is None:
        use_raw = arguments.raw or arguments.with_ema
        return Pipeline.from_workdir(arguments.source, step=arguments.step, ema=not use_raw)
    return Pipeline.from_checkpoint(arguments.source, config, ema=arguments.ema)


def _write(
    arguments: argparse.Namespace, pipe: Pipeline, target: pathlib.Path, form: str, is_run: bool
) -> None:
    dtype = None if arguments.dtype is None else np.dtype(DTYPES[arguments.dtype])
    parts = (pipe.experiment, pipe.params, pipe.frozen, target)
    if form == "diffusers":
        export_diffusers(*parts, dtype=dtype)
        return
    ema = None
    if arguments.with_ema:
        if not is_run:
            raise ValueError("--with_ema is for runs: a released file has one set of weights")
        ema = Pipeline.from_workdir(arguments.source, step=arguments.step).params
    layout = export_single_file(*parts, dtype=dtype, ema=ema)
    print(f"layout {layout}")


def _yaml(arguments: argparse.Namespace) -> int:
    if arguments.to is None:
        raise ValueError("--from_yaml needs --to=configs/x.py, the config file to write")
    target = pathlib.Path(arguments.to)
    if target.exists():
        raise ValueError(f"--to={target} exists; choose another name, nothing is overwritten")
    converted = config_from_yaml(arguments.from_yaml)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(converted.source)
    for line in converted.unmapped:
        print(f"not mapped: {line}")
    print(f"wrote {target}; {len(converted.unmapped)} keys were not mapped")
    return 0
