"""`convert`: weights between runs, single files and diffusers folders; configs from YAML."""

import argparse
import pathlib
import sys

import numpy as np

from diffusion_jax.experiment.config.binding import DTYPES
from diffusion_jax.experiment.config.files import load_config
from diffusion_jax.runs.files.export import Form, convert_weights, convert_yaml
from diffusion_jax.runs.files.lora import parse_loras

_FORMS: dict[str, Form] = {".safetensors": "safetensors", ".stablehlo": "stablehlo"}


def run(arguments: argparse.Namespace) -> int:
    """Convert what the flags say; return 0, or 1 for a YAML whose config cannot be built yet."""
    if arguments.from_yaml:
        return _yaml(arguments)
    if not (arguments.source and arguments.to):
        raise ValueError("give --from=FILE|FOLDER|RUN and --to=..., or --from_yaml=; see --help")
    target = pathlib.Path(arguments.to)
    form = arguments.format or _FORMS.get(target.suffix)
    if form is None and target.suffix:
        raise ValueError(
            f"--to={target} should end in {' or '.join(_FORMS)}, or say --format=diffusers or "
            "--format=run for a folder of this name"
        )
    if form is None:
        raise ValueError(f"--to={target} is a folder: say --format=diffusers or --format=run")
    variant = [f"--config.train.ckpt_variant={arguments.variant}"] if arguments.variant else []
    overrides = [*variant, *arguments.overrides]
    config = load_config(arguments.config, overrides) if arguments.config else None
    lines = convert_weights(
        arguments.source,
        target,
        form,
        config=config,
        dtype=None if arguments.dtype is None else np.dtype(DTYPES[arguments.dtype]),
        step=arguments.step,
        raw=arguments.raw,
        with_ema=arguments.with_ema,
        ema=arguments.ema,
        overrides=overrides,
        nonfinite=arguments.nonfinite,
        loras=parse_loras(arguments.lora),
        base=arguments.base,
        batch_size=arguments.batch_size,
    )
    print("\n".join(lines))
    return 0


def _yaml(arguments: argparse.Namespace) -> int:
    if arguments.to is None:
        raise ValueError("--from_yaml needs --to=configs/x.py, the config file to write")
    target = pathlib.Path(arguments.to)
    if target.exists():
        raise ValueError(f"--to={target} exists; choose another name, nothing is overwritten")
    lines, problem = convert_yaml(arguments.from_yaml, target)
    print("\n".join(lines))
    if problem is not None:
        print(f"the config cannot be built yet: {problem}", file=sys.stderr)
    return 0 if problem is None else 1
