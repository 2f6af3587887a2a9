"""`runs` prints a table of the runs in folders."""

import pytest
from support.reports import logged

from diffusion_jax.cli import main


def test_the_table_is_printed(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no runs\n"
    logged(tmp_path / "a", [{"step": 4, "train/loss": 1.0}])
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "run state step age best".split()
    assert lines[1].split()[:5] == [str(tmp_path / "a"), "stopped", "4", "of", "8"]


def test_runs_are_found_where_the_program_and_the_readme_make_them(tmp_path, capsys, monkeypatch):
    for folder in ("full/logs/a", "full/runs/b", "full/elsewhere/c"):
        logged(tmp_path / folder, [{"step": 4, "train/loss": 1.0}])
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert "here is no folder logs or runs; name one" in capsys.readouterr().err
    monkeypatch.chdir("full")
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == ["logs/a", "runs/b"]
    assert main(["runs", "elsewhere", "runs", "runs/b"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == ["elsewhere/c", "runs/b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["/nowhere"], "/nowhere is no folder"), (["--config.seed=3"], "does not fit: a list has")],
)
def test_what_does_not_fit_is_one_sentence(capsys, flags, message):
    assert main(["runs", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
