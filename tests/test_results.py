"""The page of results: a row is what the folder of a run tells, and takes an older one's place."""

import importlib
import json
from pathlib import Path

import pytest
from support.reports import logged, picture

ROOT = Path(__file__).parents[1]
ROWS = [
    {"step": 4, "time": 110.0, "val/loss_simple_ema": 0.5, "metrics/mind_x": 3.0},
    {"step": 8, "time": 130.0, "val/loss_simple_ema": 0.75, "metrics/mind_x": 2.0},
]
HARDWARE = {"device": "cpu", "devices": 1, "cores": 2}


@pytest.fixture
def result(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("result")


def started(workdir, **facts):
    start = {"time": 100.0, "step": 0, "hardware": HARDWARE}
    start |= {"config_file": "/home/me/configs/mnist.py:tiny", "differs": []} | facts
    (workdir / "facts.json").write_text(json.dumps({"starts": [start]}))


def test_a_row_is_written_with_its_picture_and_replaced(result, workdir, tmp_path):
    logged(workdir, ROWS)
    started(workdir, differs=[{"path": "seed", "file": "0", "run": "3"}])
    picture(workdir, "val/samples", 4, value=1)
    newest = picture(workdir, "val/samples", 8, value=2)
    page = tmp_path / "results.md"
    other = "| `configs/a.py` | x | y | 1 | z | - | `python a` |"
    page.write_text("\n".join(["# R", "", result.HEAD, "|" + "---|" * 7, other, "", "End", ""]))
    result.main([str(workdir), f"--page={page}"])
    row = (
        "| `configs/mnist.py:tiny` | 1 x cpu, 2 cores | 0:00:30 | 64 | "
        "val/loss_simple_ema 0.5 at step 4, mind_x 2 | "
        "![Samples of configs/mnist.py:tiny](images/results_mnist_tiny.png) | "
        "`python launch.py --config=configs/mnist.py:tiny --config.seed=3` |"
    )
    assert page.read_text().splitlines()[4:] == [other, row, "", "End"]
    assert (tmp_path / "images/results_mnist_tiny.png").read_bytes() == newest.read_bytes()
    result.main([str(workdir), f"--page={page}", "--score=98 of 100"])
    lines = page.read_text().splitlines()
    assert lines[4] == other and "| 98 of 100 |" in lines[5] and lines[6:] == ["", "End"]


def test_a_run_that_tells_too_little_changes_nothing(result, workdir, tmp_path, capsys):
    logged(workdir, ROWS)
    page = tmp_path / "results.md"
    page.write_text("")
    for prepare, message in (
        (lambda: None, "has logged no samples; give --picture"),
        (
            lambda: picture(workdir, "val/samples", 8),
            "does not tell its config file",
        ),
        (lambda: started(workdir), "the page has no table with the head"),
    ):
        prepare()
        with pytest.raises(SystemExit):
            result.main([str(workdir), f"--page={page}"])
        assert message in capsys.readouterr().err
    assert page.read_text() == "" and not (tmp_path / "images").exists()


def test_the_page_has_the_table(result):
    assert result.HEAD in result.PAGE.read_text().splitlines()
