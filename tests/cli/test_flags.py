"""The tables of flags: each has its help, each command its module."""

from importlib.util import find_spec

import pytest

from diffusion_jax.cli import main
from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.cli.flags import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_and_tells_of_its_flags(name, capsys):
    assert find_spec(f"diffusion_jax.cli.{name}") is not None
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([name, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and COMMANDS[name].help in said
    names = [own for own, _ in COMMANDS[name].flags]
    assert len(set(names)) == len(names)
    for own, options in COMMANDS[name].flags:
        assert own in said and options["help"]


def test_a_run_is_asked_for_where_nothing_else_will_do(capsys):
    for command in ("evaluate",):
        with pytest.raises(SystemExit):
            parse_arguments([command])
        assert "--workdir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ema", "describe", "report", "runs", "options"])
def test_commands_without_a_config_refuse_to_change_one(name, capsys):
    assert main([name, *(["--workdir=x"] if name == "ema" else []), "--config.seed=3"]) == 2
    assert capsys.readouterr().err.startswith("error: --config.seed=3 does not fit: a")
