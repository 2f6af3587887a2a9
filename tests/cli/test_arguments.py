"""The command line: defaults to training, names what it does not know."""

import pytest

from diffusion_jax.cli.arguments import parse_arguments

MNIST = "configs/mnist.py"


def test_train_is_the_default_command():
    arguments = parse_arguments([f"--config={MNIST}", "--config.seed=3", "--no_test"])
    assert arguments.command == "train" and arguments.no_test
    assert arguments.overrides == ["--config.seed=3"]


def test_sample_flags():
    arguments = parse_arguments(["sample", "--workdir=runs/x", "--class=7", "--n=4", "--steps=5"])
    assert (arguments.label, arguments.n, arguments.steps) == ("7", 4, 5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["smaple"],
            "'smaple' is not a command; choose from train, sample, evaluate, convert, report",
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


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(command in text for command in ("train", "sample", "evaluate", "report", "--config"))
