"""`report` reads what a run wrote: its curve, its last values, what lies in its folders."""

import json
import math

import pytest

from diffusion_jax.cli import main
from diffusion_jax.experiment.config_files import load_config
from diffusion_jax.runs.folder import save_config
from diffusion_jax.runs.report import BARS, report_run, sparkline


def logged(workdir, rows):
    save_config(workdir, load_config("configs/mnist.py:tiny", []))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ROWS = [
    {"step": 1, "time": 5.0, "train/loss": 4.0, "perf/images_per_second": 9.0},
    {"step": 2, "time": 6.0, "train/loss": 1.0, "lr": 0.25},
    {"step": 3, "time": 7.0, "train/loss": 2.0, "val/loss_simple_ema": 0.5, "lr": 0.125},
]


def test_it_tells_progress_losses_speed_and_what_is_in_the_folder(workdir):
    logged(workdir, ROWS)
    for name in ("checkpoints/20", "checkpoints/3", "checkpoints/set_aside", "images/train"):
        (workdir / name).mkdir(parents=True)
    for name in ("images/train/a.png", "images/train/b.png"):
        (workdir / name).touch()
    lines = "\n".join(report_run(workdir)).splitlines()
    assert lines[0].endswith("run: step 3 of 8")
    curve = next(i for i, line in enumerate(lines) if "train/loss" in line)
    assert lines[curve].split() == ["train/loss", "█▁▃"]
    assert lines[curve + 1].split() == "first 4, best 1, last 2".split()
    assert any("val/loss_simple_ema" in line for line in lines)
    words = [line.split() for line in lines]
    assert ["lr", "last", "0.125"] in words and ["perf/images_per_second", "last", "9"] in words
    assert lines[-2:] == ["checkpoints: 3, 20", "pictures: 2 logged, 0 sampled"]


def test_a_folder_without_a_run_or_without_metrics_is_one_sentence(workdir, capsys):
    for prepare, message in (
        (lambda: None, "is not the folder of a run"),
        (lambda: logged(workdir, []), "is empty: the run has not logged a step yet"),
        (lambda: (workdir / "metrics.jsonl").unlink(), "has no metrics yet"),
    ):
        prepare()
        assert main(["report", f"--workdir={workdir}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_config_that_does_not_say_how_long_is_reported_all_the_same(workdir):
    logged(workdir, ROWS)
    (workdir / "config.json").write_text('{"config": {"seed": 0}}')
    assert report_run(workdir)[0].endswith("step 3 of an unknown number")


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": 4, "train/l',
        b"\xff\xfe\x00",
        b"3",
        b'{"step": "x"}',
        b'{"step": 4, "a": [1]}',
        b"",
    ],
)
@pytest.mark.parametrize("place", [1, 3])
def test_lines_that_cannot_be_read_are_left_out_and_told(workdir, bad, place):
    logged(workdir, ROWS)
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:place], bad, *lines[place:]]) + b"\n")
    report = report_run(workdir)
    assert report[0].endswith("run: step 3 of 8")
    assert report[1] == f"  {path} is damaged: lines left out: {place + 1}"
    assert any(line.split()[:1] == ["val/loss_simple_ema"] for line in report)


def test_the_end_of_a_killed_process_is_left_out(workdir):
    logged(workdir, ROWS)
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "train/l')
    assert report_run(workdir)[0].endswith("run: step 3 of 8")


def test_a_sparkline_spans_its_values():
    assert sparkline([float(i) for i in range(8)]) == BARS
    assert sparkline([3.0, 3.0]) == BARS[0] * 2
    assert sparkline([0.0, math.nan, math.inf, 1.0]) == "▁!!█" and sparkline([math.nan]) == "!"


@pytest.mark.parametrize(("count", "width", "length"), [(60, 60, 60), (61, 60, 31), (5, 2, 2)])
def test_a_long_series_is_averaged_down(count, width, length):
    line = sparkline([float(i) for i in range(count)], width)
    assert len(line) == length and line[0] == BARS[0] and line[-1] == BARS[-1]
    assert list(line) == sorted(line)
