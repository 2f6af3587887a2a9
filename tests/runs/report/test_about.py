"""The words of a report: names that tell runs apart, numbers, and what is known of each run."""

import json

import pytest
from support.reports import logged

from diffusion_jax.runs.report.about import about, labels, number
from diffusion_jax.runs.report.gathering import gather

ROWS = [{"step": 8, "time": 70.0, "train/loss": 2.0}]


def test_runs_are_named_as_shortly_as_they_differ(tmp_path):
    runs = [gather(logged(tmp_path / name, ROWS)) for name in ("a/run", "b/run", "c")]
    assert labels(runs[:1]) == ["run"] and labels(runs[1:]) == ["run", "c"]
    assert labels(runs[:2]) == ["a/run", "b/run"]
    assert labels([runs[2], runs[2]])[0].startswith("1: ")


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.12346"), (1e5, "100,000"), (3.0, "3"), (float("nan"), "nan")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_what_nobody_knows_is_left_out(workdir):
    run = logged(workdir, ROWS)
    told = dict(about([gather(run)]))
    assert told["step"] == ["8 of 8"] and told["images seen"] == ["64"]
    assert not {"hardware", "data", "revision", "best"} & set(told)
    start = {
        "time": 10.0,
        "step": 0,
        "revision": "abc+",
        "hardware": {"device": "cpu", "devices": 2, "processes": 1, "cores": 4, "system": "Linux"},
        "data": {"train": {"name": "digits", "num_examples": 4500, "digest": "e209"}},
        "packages": {"jax": "0.10"},
    }
    (workdir / "facts.json").write_text(json.dumps({"starts": [start]}))
    told = dict(about([gather(run)]))
    assert told["hardware"] == ["2 x cpu, 1 process, 4 cores, Linux"]
    assert told["data"] == ["train: digits, 4,500, e209"] and told["revision"] == ["abc+"]
    assert told["time of training"] == ["0:01:00"] and told["packages"] == ["jax 0.10"]
    (workdir / "facts.json").write_text('{"starts": [{"time": 1, "hardware": 3, "data": [4]}]}')
    assert "hardware" not in dict(about([gather(run)]))
