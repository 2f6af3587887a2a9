"""From a command line to the arguments of a command."""

import argparse
import importlib
from collections.abc import Callable, Sequence

from diffusion_jax import __version__
from diffusion_jax.cli.flags import COMMANDS
from diffusion_jax.cli.program import program_name
from diffusion_jax.runs.command_line import make_parser, parse

EPILOG = """examples:
  PROGRAM --config=configs/mnist.py                        train
  PROGRAM --config=configs/cifar10.py:tiny --config.train.num_steps=20
  PROGRAM sample --workdir=runs/mnist --class=7 --n=16 --steps=50 --guidance_scale=3
  PROGRAM sample --checkpoint=sd_xl_base_1.0.safetensors --config=configs/sdxl.py \\
      --prompt="a red fox"
  PROGRAM convert --from=runs/sdxl --to=sdxl.safetensors --dtype=float16
  PROGRAM --resume=runs/mnist --config.train.num_steps=4000 \\
      --config.lr_schedule.decay_steps=4000                train on
  PROGRAM plan --config=configs/sdxl.py --topology=v5p:2x2x1 --per_device_batch=2
  PROGRAM options sampler                                  what config.sampler may hold

Any value of a config can be changed on the command line: --config.section.key=value;
the value `delete` removes a key. `PROGRAM COMMAND --help` lists the flags of a command."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; prints help or a one-line error and exits as argparse does."""
    arguments = parse(_parser(), COMMANDS, argv, default="train")
    arguments.run = _lazy(arguments.command)
    return arguments


def _lazy(command: str) -> Callable[[argparse.Namespace], int]:
    # Commands import jax and more; --help must not wait for them.
    return lambda given: importlib.import_module(f"diffusion_jax.cli.{command}").run(given)


def _parser() -> argparse.ArgumentParser:
    description = "Train and sample diffusion models in JAX."
    version = f"diffusion-jax {__version__}"
    return make_parser(program_name(), version, description, EPILOG, COMMANDS)
