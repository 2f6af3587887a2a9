"""The command line: defaults to training, names what it does not know, applies overrides."""

import pytest

from diffusion_jax.cli.arguments import load_config, parse_arguments

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


def test_overrides_reach_the_config_and_its_references():
    config = load_config(
        f"{MNIST}:tiny", ["--config.train.num_steps=12", "--config.model.channel_mult=(1,2)"]
    )
    assert config.train.num_steps == 12 and config.lr_schedule.decay_steps == 12
    assert config.model.channel_mult == (1, 2)


def test_overrides_may_set_what_the_file_leaves_out():
    overrides = ["--config.train.ckpt_path=runs/a", "--config.train.ckpt_ema=true"]
    overrides += ["--config.train.ignore_keys=('network/out_2',)", "--config.mesh.fsdp=2"]
    config = load_config(MNIST, overrides)
    assert config.train.ckpt_path == "runs/a" and config.train.ckpt_ema is True
    assert config.train.ignore_keys == ("network/out_2",) and config.mesh.fsdp == 2


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (MNIST, ["--config.train.num_steps=many"], "many"),
        (MNIST, ["--config.train.num_steps=1.5"], "1.5"),
        (MNIST, ["--config.train.num_steps"], "should be --config.section.key=value"),
        (MNIST, ["--config.train.num_steps.x=1"], "'num_steps' is a value and has no keys"),
        (f"{MNIST}:huge", [], "'huge' of configs/mnist.py is unknown; choose tiny"),
    ],
)
def test_wrong_overrides_are_named(path, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(path, overrides)


def test_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match="configs/nothing.py does not exist"):
        load_config("configs/nothing.py", [])


def test_a_value_that_is_none_can_be_set():
    overrides = ["--config.train.ckpt_path=runs/a.safetensors", "--config.train.keep_dims=4"]
    config = load_config("configs/sdxl.py:tiny", overrides)
    assert config.train.ckpt_path == "runs/a.safetensors" and config.train.keep_dims == 4
