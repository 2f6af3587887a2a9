"""`report` prints a summary of each run and writes the page, and takes no overrides."""

import json

import pytest
from support.reports import logged

from diffusion_jax.cli import main, report
from diffusion_jax.runs.report.page import MISSING

ROWS = [{"step": 3, "time": 5.0, "train/loss": 4.0}]


@pytest.fixture
def pages(monkeypatch):
    """The pages that were asked for: (path, folders of the runs)."""
    made = []

    def write_page(path, runs, program):
        made.append((str(path), [run.folder for run in runs]))
        return path

    monkeypatch.setattr(report, "can_draw", lambda: True)
    monkeypatch.setattr(report, "write_page", write_page)
    return made


def test_one_run_gets_its_page_in_its_folder(pages, workdir, capsys):
    logged(workdir, ROWS)
    assert main(["report", f"--workdir={workdir}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{workdir}: step 3 of 8" and said[-1] == f"wrote {workdir}/report.html"
    assert pages == [(f"{workdir}/report.html", [workdir])]


def test_several_runs_share_a_page_and_a_file_of_json(pages, tmp_path, capsys):
    runs = [logged(tmp_path / name, ROWS) for name in "ab"]
    told = tmp_path / "told.json"
    assert main(["report", *map(str, runs), f"--json={told}", "--out=x.html"]) == 0
    assert pages == [("x.html", runs)] and len(json.loads(told.read_text())["runs"]) == 2
    assert capsys.readouterr().out.count("step 3 of 8") == 2
    assert main(["report", *map(str, runs)]) == 0
    assert pages[1] == ("report.html", runs)


def test_without_the_packages_the_text_remains(workdir, monkeypatch, capsys):
    monkeypatch.setattr(report, "can_draw", lambda: False)
    logged(workdir, ROWS)
    assert main(["report", str(workdir)]) == 0
    said = capsys.readouterr()
    assert "step 3 of 8" in said.out and said.err == f"{MISSING}\n"
    assert not (workdir / "report.html").exists()


def test_a_run_that_ended_says_where_its_page_is(pages, workdir, capsys):
    report.report_page(workdir, "launch.py")
    assert "no report: " in capsys.readouterr().err
    logged(workdir, ROWS)
    report.report_page(workdir, "launch.py")
    assert capsys.readouterr().out == f"report: {workdir}/report.html\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=/nowhere"], "is not the folder of a run"),
        (["--workdir=x", "--config.seed=3"], "--config.seed=3 does not fit: a report has no conf"),
        ([], "name at least one run: report DIR [DIR ...]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, flags, message):
    assert main(["report", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
