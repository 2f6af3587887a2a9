"""The runs in folders are listed, the newest first, from the little that is read of each."""

import os
import time

import pytest
from support.reports import logged

from diffusion_jax.runs.listing import age_text, list_runs, run_lines
from diffusion_jax.runs.report import gathering
from diffusion_jax.runs.report.gathering import Best


def test_runs_are_found_and_sorted_by_age(tmp_path, monkeypatch):
    rows = [{"step": step, "train/loss": 1.0} for step in (2, 8)]
    for name, age in (("old", 7200), ("new", 5)):
        run = logged(tmp_path / name, rows)
        os.utime(run / "metrics.jsonl", times=(time.time() - age,) * 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "latest").symlink_to("new")
    with (tmp_path / "new" / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n{"step": 9')
    scores = {"4": {"val/loss_simple_ema": 0.5}, "8": {"val/loss_simple_ema": 0.25}}
    (tmp_path / "old" / "checkpoints" / "8").mkdir(parents=True)
    monkeypatch.setattr(gathering, "load_metadata", lambda folder, step: {"scores": scores})
    new, old = list_runs(tmp_path)
    assert (new.folder.name, new.state, new.step, new.total) == ("new", "finished", 8, 8)
    assert new.best is None and old.best == Best("val/loss_simple_ema", "min", 8, 0.25)
    assert 7190 < old.age < 7300
    line = run_lines([new, old])[2]
    assert line.split("  ")[1:] == [
        "finished", "8 of 8", "2 h", "val/loss_simple_ema 0.25 at step 8"
    ]  # fmt: skip
    assert [run.folder.name for run in list_runs(tmp_path / "old")] == ["old"]


def test_a_run_that_only_began_is_listed(tmp_path):
    run = logged(tmp_path / "a", [])
    (run / "metrics.jsonl").unlink()
    (found,) = list_runs(tmp_path)
    assert (found.state, found.step, found.best) == ("stopped", 0, None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.0, "40 s"), (180.0, "3 min"), (18e3, "5 h"), (1036800.0, "12 d")]
)
def test_an_age_is_short(seconds, text):
    assert age_text(seconds) == text
