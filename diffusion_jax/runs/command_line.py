"""Tables of commands and flags -> parsed arguments; what is not known is named with its like.

Nothing heavy is imported here, so that --help does not wait for it.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

# A flag: its name, and the keywords of argparse's add_argument.
Flag = tuple[str, dict[str, Any]]
Record = TypeVar("Record", bound=tuple)
SWITCH = {"action": "store_true"}
# Every command has it.
DEBUG: Flag = ("--debug", {"help": "no donation, NaN checks, debugger", **SWITCH})


class Command(NamedTuple):
    """One command: its help and its flags."""

    help: str
    flags: tuple[Flag, ...]


def flag(name: str, help: str, **options: Any) -> Flag:
    """Make a flag; without a type or an action it takes a text."""
    return name, {"help": help, **options}


def make_parser(
    program: str,
    version: str,
    description: str,
    epilog: str,
    commands: Mapping[str, Command],
) -> argparse.ArgumentParser:
    """Make a parser of `program COMMAND FLAGS`; "PROGRAM" in the epilog becomes the program."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=epilog.replace("PROGRAM", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version)
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in commands.items():
        sub = parsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            allow_abbrev=False,
        )
        for own, options in (DEBUG, *command.flags):
            sub.add_argument(own, **_with_default(options))
    return parser


def _with_default(options: dict[str, Any]) -> dict[str, Any]:
    """Let the help of a flag end with its default, if it has one."""
    if "default" not in options or options["default"] in (None, [], ()):
        return options
    return options | {"help": f"{options['help']} (default: %(default)s)"}


def parse(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Command],
    argv: Sequence[str],
    *,
    default: str,
) -> argparse.Namespace:
    """Parse a command line; prints help or a one-line error and exits as argparse does.

    default: the command where none is named. What begins with --config. is kept as `overrides`.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        _refuse(parser, f"{argv[0]!r} is not a command", argv[0], commands)
    if not argv or argv[0] not in (*commands, "-h", "--help", "--version"):
        argv = [default, *argv]
    arguments, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if not item.startswith("--config.")]
    if unknown and rest[0].startswith("--config.") and "=" not in rest[0]:
        parser.error(f"write {rest[0]}={unknown[0]}, with an equals sign")
    if unknown:
        known = [name for name, _ in (DEBUG, *commands[arguments.command].flags)]
        what = f"{unknown[0]!r} is not a flag of {arguments.command}"
        _refuse(parser, what, unknown[0].partition("=")[0], known)
    arguments.overrides = rest
    return arguments


def fields_of(record: type[Record], arguments: argparse.Namespace) -> Record:
    """Make a record (a NamedTuple) of the arguments that have the names of its fields."""
    return record(**{name: getattr(arguments, name) for name in record._fields})  # type: ignore[attr-defined]


def _refuse(
    parser: argparse.ArgumentParser, what: str, wrong: str, allowed: Collection[str]
) -> NoReturn:
    from diffusion_jax.experiment.config.binding import choices  # --help does not wait for jax

    parser.error(f"{what}; {choices(wrong, allowed)}")
