"""The command line: defaults to training, names what it does not know."""

import sys
from importlib.util import find_spec

import pytest

from diffusion_jax.cli.arguments import parse_arguments
from diffusion_jax.cli.flags import COMMANDS

MNIST = "configs/mnist.py"


def test_train_is_the_default_command():
    arguments = parse_arguments([f"--config={MNIST}", "--config.seed=3", "--no_test"])
    assert arguments.command == "train" and arguments.no_test
    assert arguments.overrides == ["--config.seed=3"]


def test_sample_flags():
    arguments = parse_arguments(["sample", "--workdir=runs/x", "--class=7", "--n=4", "--steps=5"])
    assert (arguments.label, arguments.n, arguments.steps) == ("7", 4, 5)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(command in text for command in ("train", "sample", "evaluate", "report", "--config"))


def test_every_command_has_its_module_and_its_flags():
    for command in COMMANDS:
        assert find_spec(f"diffusion_jax.cli.{command}") is not None
        required = [
            f"{name}=x" for name, options in COMMANDS[command].flags if "required" in options
        ]
        assert parse_arguments([command, *required, "--debug"]).debug
    assert parse_arguments(["train", "--process_id=3"]).process_id == 3
    assert parse_arguments(["cache", "--local_device_ids=0,1"]).local_device_ids == "0,1"


@pytest.mark.parametrize("name", ["launch.py", "__main__.py", "diffusion-jax"])
def test_messages_name_the_program_as_it_was_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{name}"])
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    called = {"launch.py": "python launch.py", "__main__.py": "python -m diffusion_jax"}
    program = called[name] if name in called else name
    text = capsys.readouterr().out
    assert f"usage: {program} " in text and f"  {program} plan --config" in text
