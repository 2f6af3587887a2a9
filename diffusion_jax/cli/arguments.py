"""The flags of every command, and how --config with its overrides becomes a ConfigDict."""

import argparse
import importlib
from collections.abc import Callable, Sequence

from diffusion_jax.config_files import load_config

__all__ = ["load_config", "parse_arguments"]

COMMANDS = {
    "train": "train a model (the default command)",
    "sample": "draw images from a finished or running run",
    "evaluate": "compute the losses of a run on a split of its data",
    "report": "summarise a run: progress, losses, speed, checkpoints",
}
EPILOG = """examples:
  python launch.py --config=configs/mnist.py                        train
  python launch.py --config=configs/cifar10.py:tiny --config.train.num_steps=20
  python launch.py sample --workdir=runs/mnist --class=7 --n=16 --steps=50 --guidance_scale=3
  python launch.py --resume=runs/mnist --config.train.num_steps=4000 \\
      --config.lr_schedule.decay_steps=4000                         train on

Any value of a config can be changed on the command line: --config.section.key=value.
`python launch.py COMMAND --help` lists the flags of a command."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; prints help or a one-line error and exits as argparse does."""
    argv = list(argv)
    if not argv or argv[0].startswith("--config") or argv[0] not in (*COMMANDS, "-h", "--help"):
        if argv and not argv[0].startswith("-"):
            _parser().error(f"{argv[0]!r} is not a command; choose from {', '.join(COMMANDS)}")
        argv = ["train", *argv]
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if not item.startswith("--config.")]
    if unknown and rest[0].startswith("--config.") and "=" not in rest[0]:
        parser.error(f"write {rest[0]}={unknown[0]}, with an equals sign")
    if unknown:
        parser.error(f"{unknown[0]!r} is not a flag of {arguments.command}; see --help")
    arguments.overrides = rest
    arguments.run = _lazy(arguments.command)
    return arguments


def _lazy(command: str) -> Callable[[argparse.Namespace], int]:
    # Commands import jax and more; --help must not wait for them.
    def run(arguments: argparse.Namespace) -> int:
        module = importlib.import_module(f"diffusion_jax.cli.{command}")
        return module.run(arguments)

    return run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch.py",
        description="Train and sample diffusion models in JAX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="no donation, NaN checks, debugger")
        _FLAGS[name](sub)
    return parser


def _train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="configs/x.py[:variant]; --config.a.b=v overrides a value")
    parser.add_argument("--workdir", help="folder of this run; continues the run that is in it")
    parser.add_argument("--logdir", default="logs", help="where new run folders are made")
    parser.add_argument("--name", default="", help="name of the run folder instead of the config's")
    parser.add_argument("--postfix", default="", help="appended to the name of the run folder")
    parser.add_argument(
        "--resume", help="continue from a run folder or from one of its checkpoints"
    )
    parser.add_argument("--seed", type=int, help="instead of the config's seed")
    parser.add_argument("--no_test", action="store_true", help="skip the test split at the end")


def _sample_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--class", dest="label", help="class number or name, or a list: 7 or 1,2,3")
    parser.add_argument("--n", type=int, default=16, help="number of images (per class in a list)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance_scale", type=float, help="1 is off (default: the config's)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) only")
    parser.add_argument("--batch_size", type=int, default=64, help="images per device call")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of the EMA")
    parser.add_argument("--out", help="folder for the images (default: WORKDIR/samples/...)")


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--split", default="test", help="train, validation or test")


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of a run")


_FLAGS = {
    "train": _train_flags,
    "sample": _sample_flags,
    "evaluate": _evaluate_flags,
    "report": _report_flags,
}
