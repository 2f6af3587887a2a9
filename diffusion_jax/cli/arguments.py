"""The flags of every command, and how --config with its overrides becomes a ConfigDict."""

import argparse
import importlib
from collections.abc import Callable, Sequence

from diffusion_jax import __version__
from diffusion_jax.cli.program import program_name
from diffusion_jax.experiment.config_files import load_config

__all__ = ["load_config", "parse_arguments"]

COMMANDS = {
    "train": "train a model (the default command)",
    "sample": "draw images from a run or from released weights",
    "evaluate": "compute the losses of a run on a split of its data",
    "convert": "weights between runs, .safetensors files and diffusers; configs from YAML",
    "report": "summarise a run: progress, losses, speed, checkpoints",
    "cache": "encode the training split into the latent cache of a config",
    "plan": "memory, FLOPs and time of a config on a pod that you do not have",
}
EPILOG = """examples:
  python launch.py --config=configs/mnist.py                        train
  python launch.py --config=configs/cifar10.py:tiny --config.train.num_steps=20
  python launch.py sample --workdir=runs/mnist --class=7 --n=16 --steps=50 --guidance_scale=3
  python launch.py sample --checkpoint=sd_xl_base_1.0.safetensors --config=configs/sdxl.py \\
      --prompt="a red fox"
  python launch.py convert --from=runs/sdxl --to=sdxl.safetensors --dtype=float16
  python launch.py --resume=runs/mnist --config.train.num_steps=4000 \\
      --config.lr_schedule.decay_steps=4000                         train on
  python launch.py plan --config=configs/sdxl.py --topology=v5p:2x2x1 --per_device_batch=2

Any value of a config can be changed on the command line: --config.section.key=value.
`python launch.py COMMAND --help` lists the flags of a command."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; prints help or a one-line error and exits as argparse does."""
    argv = list(argv)
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
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
        prog=program_name(),
        description="Train and sample diffusion models in JAX.",
        epilog=EPILOG.replace("python launch.py", program_name()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffusion-jax {__version__}")
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
    _process_flags(parser)


def _process_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes", "not needed under SLURM, Open MPI and on TPUs; see docs/pods.md"
    )
    group.add_argument("--coordinator_address", help="HOST:PORT where process 0 can be reached")
    group.add_argument("--num_processes", type=int, help="how many there are; 1: this one alone")
    group.add_argument("--process_id", type=int, help="number of this process, from 0")
    group.add_argument("--local_device_ids", help="GPUs of this host to use: 0,1 (default: all)")


def _sample_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--checkpoint", help="instead: .safetensors, .ckpt or diffusers folder")
    parser.add_argument("--config", help="with --checkpoint: the config that describes it")
    parser.add_argument("--class", dest="label", help="class number or name, or a list: 7 or 1,2,3")
    parser.add_argument("--prompt", help="text, for models that read text")
    parser.add_argument("--negative_prompt", help="text to lead away from")
    parser.add_argument("--n", type=int, help="images of the prompt or of each class, 16 if unset")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--guidance_scale", type=float, help="1 is off (default: the config's)")
    parser.add_argument("--height", type=int, help="pixels (default: the config's)")
    parser.add_argument("--width", type=int, help="pixels (default: the config's)")
    parser.add_argument("--image", help="file to begin with (--strength) or to complete (--mask)")
    parser.add_argument("--strength", type=float, help="share of the steps that redraws --image")
    parser.add_argument("--mask", help="file, white where --image is kept")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) only")
    parser.add_argument("--batch_size", type=int, default=64, help="images per device call")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of a run's EMA")
    parser.add_argument("--ema", action="store_true", help="the averages in a .ckpt file")
    parser.add_argument("--out", help="folder for the images (default: WORKDIR/samples/...)")


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", help="run, .safetensors, .ckpt, diffusers folder")
    parser.add_argument("--config", help="the config that describes --from, if that is no run")
    parser.add_argument("--to", help="new .safetensors file, folder, or config file")
    parser.add_argument(
        "--format", choices=("safetensors", "diffusers", "run"), help="of --to, if its name is open"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the file (default: as is)"
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    parser.add_argument("--raw", action="store_true", help="raw weights of a run, not its EMA")
    parser.add_argument(
        "--with_ema", action="store_true", help="raw weights of a run, and its EMA as model_ema.*"
    )
    parser.add_argument("--ema", action="store_true", help="the averages in a .ckpt file")
    parser.add_argument("--from_yaml", help="YAML config of sgm or latent-diffusion")


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    parser.add_argument("--split", default="test", help="train, validation or test")


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of a run")


def _cache_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="a config with a first stage and config.latent_cache")
    parser.add_argument("--workdir", help="of a run: with the frozen networks that it saved")
    _process_flags(parser)


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="configs/x.py[:variant]; --config.a.b=v overrides a value")
    parser.add_argument("--topology", help="v5p:2x2x1 (TPU slices), h100:8 (GPUs) or cpu:8")
    parser.add_argument(
        "--per_device_batch", type=int, help="samples per device and step (default: the config's)"
    )
    parser.add_argument(
        "--search", action="store_true", help="find the largest batch that fits, by remat policy"
    )
    parser.add_argument("--json", help="file to write all figures to")


_FLAGS = {
    "train": _train_flags,
    "sample": _sample_flags,
    "evaluate": _evaluate_flags,
    "convert": _convert_flags,
    "report": _report_flags,
    "cache": _cache_flags,
    "plan": _plan_flags,
}
