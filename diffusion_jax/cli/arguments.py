"""From a command line to the arguments of a command; what is not known is named with its like."""

import argparse
import importlib
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from diffusion_jax import __version__
from diffusion_jax.cli.flags import COMMANDS, DEBUG
from diffusion_jax.cli.program import program_name

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
    argv = list(argv)
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        _refuse(parser, f"{argv[0]!r} is not a command", argv[0], COMMANDS)
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
        argv = ["train", *argv]
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if not item.startswith("--config.")]
    if unknown and rest[0].startswith("--config.") and "=" not in rest[0]:
        parser.error(f"write {rest[0]}={unknown[0]}, with an equals sign")
    if unknown:
        known = [DEBUG[0], *(name for name, _ in COMMANDS[arguments.command].flags)]
        what = f"{unknown[0]!r} is not a flag of {arguments.command}"
        _refuse(parser, what, unknown[0].partition("=")[0], known)
    arguments.overrides = rest
    arguments.run = _lazy(arguments.command)
    return arguments


def _refuse(
    parser: argparse.ArgumentParser, what: str, wrong: str, allowed: Collection[str]
) -> NoReturn:
    from diffusion_jax.experiment.binding import choices  # --help does not wait for jax

    parser.error(f"{what}; {choices(wrong, allowed)}")


def _lazy(command: str) -> Callable[[argparse.Namespace], int]:
    # Commands import jax and more; --help must not wait for them.
    def run(arguments: argparse.Namespace) -> int:
        module = importlib.import_module(f"diffusion_jax.cli.{command}")
        return module.run(arguments)

    return run


def _parser() -> argparse.ArgumentParser:
    program = program_name()
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train and sample diffusion models in JAX.",
        epilog=EPILOG.replace("PROGRAM", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffusion-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        for flag, options in (DEBUG, *command.flags):
            sub.add_argument(flag, **options)
    return parser
