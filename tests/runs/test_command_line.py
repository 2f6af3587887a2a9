"""Tables of commands become a parser, and what it does not know is named with its like."""

from typing import NamedTuple

import pytest

from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.runs.command_line import SWITCH, Command, fields_of, flag, make_parser, parse

COMMANDS = {
    "draw": Command("draw something", (flag("--n", "how many", type=int, default=3),)),
    "look": Command("look at it", (flag("--all", "everything", **SWITCH),)),
}


class Wish(NamedTuple):
    n: int


def parsed(*argv):
    parser = make_parser("me", "me 1.0", "what it is", "call PROGRAM", COMMANDS)
    return parse(parser, COMMANDS, argv, default="draw")


def test_a_flag_is_what_argparse_wants():
    assert flag("--n", "how many", type=int) == ("--n", {"help": "how many", "type": int})


def test_help_ends_with_the_default_if_there_is_one(capsys):
    for command, said in (("draw", "how many (default: 3)"), ("look", "everything")):
        with pytest.raises(SystemExit):
            parsed(command, "--help")
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        assert any(line.endswith(said) for line in lines)


def test_the_default_command_and_overrides():
    arguments = parsed("--config.a=1", "--n=5", "--config.b=2")
    assert (arguments.command, arguments.n) == ("draw", 5)
    assert arguments.overrides == ["--config.a=1", "--config.b=2"]
    assert fields_of(Wish, arguments) == Wish(5)
    assert parsed("look", "--all").all and parsed() == parsed("draw")


def test_help_and_version_name_the_program(capsys):
    for asked, said in (("--help", "call me"), ("--version", "me 1.0"), ("look --help", "look at")):
        with pytest.raises(SystemExit) as stopped:
            parsed(*asked.split())
        assert stopped.value.code == 0 and said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["smaple"],
            "'smaple' is not a command; did you mean 'sample'? choose from cache, convert",
        ),
        (["--confg=x"], "'--confg=x' is not a flag of train; did you mean '--config'? choose from"),
        (
            ["sample", "--width_=3"],
            "is not a flag of sample; did you mean '--width'? choose from -",
        ),
        (["--workdir=x", "--batchsize=3"], "'--batchsize=3' is not a flag of train"),
        (["sample", "--workdir=x", "extra"], "'extra' is not a flag of sample"),
        (["convert", "--dtype=int8"], "--dtype"),
    ],
)
def test_unknown_words_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
