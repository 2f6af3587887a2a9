"""`ema` writes one average, or prints and writes a table of several."""

import pytest

from diffusion_jax.cli import ema, main
from diffusion_jax.experiment.scoring import ScoringOptions
from diffusion_jax.runs.averages import Average, Row


def test_one_length_is_written(monkeypatch, capsys):
    asked = []

    def write_average(workdir, length, *, step, out):
        asked.append((workdir, length, step, out))
        return "runs/x/ema/0.1_8", Average({}, 0.0123)

    monkeypatch.setattr(ema, "write_average", write_average)
    assert main(["ema", "--workdir=runs/x", "--length=0.1", "--step=8"]) == 0
    assert asked == [("runs/x", 0.1, 8, None)]
    said = capsys.readouterr().out
    assert "wrote runs/x/ema/0.1_8; its profile is met within 1.2%" in said
    assert "sample --workdir=runs/x/ema/0.1_8" in said


def test_several_lengths_are_a_table(monkeypatch, capsys, tmp_path):
    asked = []

    def sweep(*given, **options):
        asked.append((given, options))
        yield Row("raw", None, {"validation/loss": 0.5})
        yield Row("0.1", 0.01, {"validation/loss": 0.25})

    monkeypatch.setattr(ema, "sweep", sweep)
    flags = ["--lengths=0.05,0.1", "--metrics=mind", "--num_samples=64"]
    assert main(["ema", f"--workdir={tmp_path}", *flags]) == 0
    scoring = ScoringOptions(metrics=("mind",), num_samples=64)
    assert asked == [
        ((str(tmp_path), [0.05, 0.1], "validation"), {"step": None, "scoring": scoring})
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [
        ["length", "distance", "validation/loss"], ["raw", "0.5"], ["0.1", "0.010", "0.25"],
    ]  # fmt: skip
    assert (tmp_path / "ema" / "sweep.csv").read_text().startswith("length,distance,validation")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --length=0.1 to write one average, or --lengths"),
        (["--length=0.1", "--lengths=0.1"], "give --length=0.1 to write one average"),
        (["--length=0.1", "--metrics=mind"], "--metrics should come with --lengths"),
        (["--lengths=0.1", "--num_samples=9"], "--num_samples should come with --metrics"),
        (["--lengths=0.1", "--out=x"], "--out should come with --length"),
        (["--lengths=a"], "--lengths = 'a' should be like 0.05,0.1"),
        (["--length=0.1", "--config.seed=3"], "--config.seed=3 does not fit"),
        (["--length=0.1"], "is not the folder of a run"),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, flags, message):
    assert main(["ema", "--workdir=/nowhere", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
