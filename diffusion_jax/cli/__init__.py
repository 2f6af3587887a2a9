"""The command line: one parser, one module a command, nothing heavy imported before its use."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence

from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.cli.flags import NO_CONFIG
from diffusion_jax.devices.gpu_memory import ask_for_gpu_memory
from diffusion_jax.devices.host_memory import keep_freed_memory
from diffusion_jax.devices.xla_flags import add_cpu_flags
from diffusion_jax.runs.failures import exit_code, sentence_of
from diffusion_jax.train.hooks.received import Interrupted, handle_signals, interruptible

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code (2: bad input, told in one sentence)."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    # A second start should not compile again. Read by jax when it is first imported; the user's
    # own choice wins.
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    if not cache.startswith("~"):  # as it does for a user without a home
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{cache}/diffusion_jax/xla")
    _show_log()
    share = ask_for_gpu_memory()
    if arguments.command == "train":
        _tune_the_process()
        if share is not None:
            _log.info("JAX may have most of the memory of each GPU: %s", share)
    if os.getcwd() not in sys.path:  # where a config's package.module:Object may lie
        sys.path.append(os.getcwd())
    try:
        with contextlib.ExitStack() as stack:
            if arguments.command == "train":  # before jax is imported, which takes seconds
                stack.enter_context(interruptible(stack.enter_context(handle_signals())))
            if "coordinator_address" in arguments:
                stack.enter_context(_joined(arguments))
            if arguments.overrides and arguments.command in NO_CONFIG:
                why = NO_CONFIG[arguments.command]
                raise ValueError(f"{arguments.overrides[0]} does not fit: {why}")
            return arguments.run(arguments)
    except Interrupted as signal:
        print(f"{signal}: nothing was to be saved; the same command goes on", file=sys.stderr)
        return exit_code(signal)
    except Exception as error:
        if arguments.debug or exit_code(error) != 2:
            raise
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2


def _joined(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    from diffusion_jax.devices import processes

    flags = "coordinator_address num_processes process_id local_device_ids".split()
    place = processes.place_of_flags(*(getattr(arguments, flag) for flag in flags))
    return processes.joined(place, exit_code)


def _tune_the_process() -> None:
    added = add_cpu_flags()
    if added is not None:
        _log.info("Faster convolutions on this CPU: XLA_FLAGS += %s", added)
    if keep_freed_memory():
        _log.info(
            "Memory that a step frees is kept for the next one (MALLOC_ARENA_MAX= turns it off)"
        )


def _show_log() -> None:
    """Show what the package says while something takes long, and the warnings of all others."""
    logging.getLogger("diffusion_jax").setLevel(logging.INFO)
    if not logging.root.handlers:  # else a library would bring its own format
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.root.addHandler(handler)
