"""`convert` on the command line: what becomes what, and which flags go together."""

import numpy as np
import pytest

from diffusion_jax.cli import convert, main


@pytest.fixture
def asked(monkeypatch):
    """What the library was asked for."""
    calls = []

    def convert_weights(source, target, form, **options):
        calls.append((source, str(target), form, options))
        return ["layout sdxl", f"wrote {target}"]

    monkeypatch.setattr(convert, "convert_weights", convert_weights)
    return calls


@pytest.mark.parametrize(
    ("to", "flags", "form"),
    [
        ("x.safetensors", [], "safetensors"),
        ("x.safetensors", ["--format=native"], "native"),
        ("x.stablehlo", [], "stablehlo"),
        ("folder", ["--format=diffusers"], "diffusers"),
        ("folder", ["--format=run"], "run"),
    ],
)
def test_the_name_of_the_target_or_the_format_says_what_to_write(asked, capsys, to, flags, form):
    assert main(["convert", "--from=runs/x", f"--to={to}", *flags]) == 0
    assert [(source, target, kind) for source, target, kind, _ in asked] == [("runs/x", to, form)]
    assert capsys.readouterr().out == f"layout sdxl\nwrote {to}\n"


def test_options_reach_the_library(asked):
    more = ["--lora=x:0.5", "--lora=y", "--base=z"]
    flags = [*more, "--dtype=bfloat16", "--step=8", "--with_ema", "--config.seed=3"]
    assert main(["convert", "--from=runs/x", "--to=x.safetensors", *flags]) == 0
    options = asked[0][3]
    assert options.pop("dtype") == np.dtype("bfloat16") and options.pop("overrides") == [flags[-1]]
    assert options.pop("loras") == {"x": 0.5, "y": 1.0} and options.pop("base") == "z"
    assert options == dict(
        config=None, step=8, raw=False, with_ema=True, ema=False, nonfinite=False, batch_size=1
    )


def test_a_released_file_comes_with_its_config(asked):
    flags = ["--config=configs/mnist.py:tiny", "--config.seed=3", "--format=run", "--ema"]
    assert main(["convert", "--from=x.ckpt", "--to=runs/y", *flags]) == 0
    options = asked[0][3]
    assert options["config"].seed == 3 and options["ema"] and options["dtype"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from=runs/x"], "give --from=FILE|FOLDER|RUN and --to=..., or --from_yaml="),
        (["--to=x.safetensors"], "give --from=FILE|FOLDER|RUN and --to=..., or --from_yaml="),
        (
            ["--from=runs/x", "--to=y.onnx"],
            "should end in .safetensors or .stablehlo, or say --for",
        ),
        (["--from=runs/x", "--to=y"], "--to=y is a folder: say --format=diffusers or --format=run"),
        (["--from_yaml=x.yaml"], "--from_yaml needs --to=configs/x.py"),
        (["--from_yaml=x.yaml", "--to=configs"], "--to=configs exists; choose another name"),
        (["--from_yaml=none.yaml", "--to=new.py"], "none.yaml"),
    ],
)
def test_what_is_missing_is_one_sentence(asked, capsys, flags, message):
    assert main(["convert", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not asked
