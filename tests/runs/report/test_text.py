"""`report` reads what a run wrote: its curve, its last values, what lies in its folders."""

import math

import pytest
from support.reports import logged

from diffusion_jax.cli import main
from diffusion_jax.runs.report.gathering import gather
from diffusion_jax.runs.report.text import BARS, duration, few, sparkline, text_report

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
    lines = "\n".join(text_report(gather(workdir))).splitlines()
    assert lines[0].endswith("run: step 3 of 8")
    assert lines[1] == "  stopped, 0:00:02 of training, 24 images seen"
    words = [line.split() for line in lines]
    assert ["first", "lowest", "last"] in words
    assert ["train/loss", "4", "1", "2", "█▁▃"] in words
    assert any("val/loss_simple_ema" in line for line in lines)
    assert ["lr", "0.25", "0.125", "0.125", "█▁"] in words
    assert ["perf/images_per_second", "9", "9", "9", "▁"] in words
    assert lines[-3:-1] == ["checkpoints: 3, 20", "best val/loss_simple_ema: 0.5 at step 3"]
    assert lines[-1] == "pictures: 2 logged, 0 sampled"


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
    assert text_report(gather(workdir))[0].endswith("step 3 of an unknown number")


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
    report = text_report(gather(workdir))
    assert report[0].endswith("run: step 3 of 8")
    assert report[2] == f"  {path} is damaged: lines left out: {place + 1}"
    assert any(line.split()[:1] == ["val/loss_simple_ema"] for line in report)


def test_the_end_of_a_killed_process_is_left_out(workdir):
    logged(workdir, ROWS)
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "train/l')
    assert text_report(gather(workdir))[0].endswith("run: step 3 of 8")


def test_a_sparkline_spans_its_values():
    assert sparkline([float(i) for i in range(8)]) == BARS
    assert sparkline([3.0, 3.0]) == BARS[0] * 2
    assert sparkline([0.0, math.nan, math.inf, 1.0]) == "▁!!█" and sparkline([math.nan]) == "!"


@pytest.mark.parametrize(("count", "width", "length"), [(60, 60, 60), (61, 60, 31), (5, 2, 2)])
def test_a_long_series_is_averaged_down(count, width, length):
    line = sparkline([float(i) for i in range(count)], width)
    assert len(line) == length and line[0] == BARS[0] and line[-1] == BARS[-1]
    assert list(line) == sorted(line)


def test_numbers_that_repeat_are_told_once(workdir):
    logged(workdir, [{**row, "train/loss_simple": row["train/loss"]} for row in ROWS])
    lines = text_report(gather(workdir))
    assert lines[lines.index(next(x for x in lines if "train/loss " in x)) + 1].split() == (
        "the same: train/loss_simple".split()
    )
    assert sum("█▁▃" in line for line in lines) == 1


def test_durations_and_lists_are_short():
    assert duration(90061.4) == "1 day, 1:01:01" and few([1, 2]) == "1, 2"
    assert few(list(range(9))) == "0, 1, 2, 3, ..."
