"""`report` prints the lines of runs.report, and takes no overrides: it reads what was written."""

import pytest

from diffusion_jax.cli import main, report


def test_the_lines_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(report, "report_run", lambda workdir: [f"{workdir}: step 3 of 8", "more"])
    assert main(["report", "--workdir=runs/x"]) == 0
    assert capsys.readouterr().out == "runs/x: step 3 of 8\nmore\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=/nowhere"], "is not the folder of a run"),
        (["--workdir=x", "--config.seed=3"], "--config.seed=3 does not fit: a report has no conf"),
    ],
)
def test_what_does_not_fit_is_one_sentence(capsys, flags, message):
    assert main(["report", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
