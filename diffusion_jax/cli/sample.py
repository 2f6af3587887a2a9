"""`sample`: draw from a run or released weights, and write images and a grid, or videos."""

import argparse
import pathlib
import sys
import warnings

from diffusion_jax.pipeline import NonFiniteWarning, Pipeline, with_files
from diffusion_jax.runs.command_line import fields_of
from diffusion_jax.runs.drawing.asked import Asked, Call, make_call
from diffusion_jax.runs.drawing.recipe import loaded_facts, model_name
from diffusion_jax.runs.drawing.samples import check_empty, default_folder
from diffusion_jax.runs.files.lora import parse_loras
from diffusion_jax.runs.folder import has_run
from diffusion_jax.runs.inputs.embeddings import parse_embeddings


def run(arguments: argparse.Namespace) -> int:
    """Draw what the flags ask for; return 0, or 1 if any of it is not finite."""
    folder = pathlib.Path(arguments.out) if arguments.out else default_folder(arguments.workdir)
    check_empty(folder)
    loras = parse_loras(arguments.lora)
    embeddings = parse_embeddings(arguments.embedding)
    pipe = with_files(_pipeline(arguments), loras, embeddings)
    asked = fields_of(Asked, arguments)
    name = model_name(arguments.workdir or arguments.checkpoint, arguments.step)
    facts = loaded_facts(
        loras=loras,
        embeddings=embeddings,
        overrides=arguments.overrides,
        weights="raw" if arguments.raw else "ema" if arguments.ema else arguments.variant,
    )
    return draw(pipe, make_call(pipe, asked, folder, name=name, load=_load, more=facts))


def draw(pipe: Pipeline, call: Call) -> int:
    """Draw, write and print; return 0, or 1 if anything that was drawn is not finite."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NonFiniteWarning)
        drawn = pipe(call.conditions, **call.options)
    print(call.write(drawn))
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return int(any(warning.category is NonFiniteWarning for warning in caught))


def _load(path: pathlib.Path) -> Pipeline:
    return Pipeline.from_workdir(path) if has_run(path) else Pipeline.from_checkpoint(path)


def _pipeline(arguments: argparse.Namespace) -> Pipeline:
    if bool(arguments.workdir) == bool(arguments.checkpoint):
        raise ValueError("give --workdir=RUN, or --checkpoint=FILE with --config=configs/x.py")
    if arguments.workdir:
        return Pipeline.from_workdir(
            arguments.workdir,
            step=arguments.step,
            ema=not arguments.raw,
            overrides=arguments.overrides,
        )
    variant = [f"--config.train.ckpt_variant={arguments.variant}"] if arguments.variant else []
    return Pipeline.from_checkpoint(
        arguments.checkpoint,
        arguments.config,
        overrides=[*variant, *arguments.overrides],
        ema=arguments.ema,
    )
