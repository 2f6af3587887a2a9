"""What a report tells of a run comes from its folder: time, state, best score, pictures, facts."""

import fcntl
import json

import pytest
from support.reports import logged, picture

from diffusion_jax.runs.report.gathering import config_table, count_pictures, gather, run_state

ROWS = [
    {"step": 4, "time": 110.0, "train/loss": 4.0, "val/loss_simple_ema": 0.5},
    {"step": 6, "time": 115.0, "train/loss": 1.0},
    {"step": 8, "time": 1010.0, "train/loss": 2.0, "val/loss_simple_ema": 0.7},
]


def test_time_counts_while_a_process_trained(workdir):
    logged(workdir, ROWS)
    assert gather(workdir).seconds == 900.0  # the starts are not known
    starts = [{"time": 100.0, "step": 0}, {"time": 1000.0, "step": 6, "revision": "abc"}]
    (workdir / "facts.json").write_text(json.dumps({"starts": starts}))
    found = gather(workdir)
    assert found.seconds == 10.0 + 5.0 + 10.0
    assert found.facts["revision"] == "abc" and found.images_seen == 8 * 8
    (workdir / "facts.json").write_text("{")
    assert gather(workdir).seconds == 900.0


def test_the_best_score_is_the_monitored_one(workdir):
    logged(workdir, ROWS)
    assert gather(workdir).best == ("val/loss_simple_ema", "min", 4, 0.5)
    logged(workdir, ROWS, "checkpoint.mode=max")
    assert gather(workdir).best == ("val/loss_simple_ema", "max", 8, 0.7)
    logged(workdir, ROWS[1:2])
    assert gather(workdir).best is None


def test_the_state_says_whether_a_process_trains(workdir):
    logged(workdir, ROWS)
    assert gather(workdir).state == "finished" and run_state(workdir, 7, 8) == "stopped"
    with (workdir / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert gather(workdir).state == "running"
    assert gather(workdir).state == "finished"


def test_pictures_are_found_by_name_and_step(workdir):
    logged(workdir, ROWS)
    paths = [picture(workdir, "val/samples", step) for step in (8, 4)]
    (workdir / "images/val/other.png").touch()
    found = gather(workdir)
    assert found.pictures == {"val/samples": [(4, paths[1]), (8, paths[0])]}
    assert count_pictures(workdir / "images") == 3 and found.num_samples == 0
    assert found.draws


def test_only_what_differs_between_configs_is_listed(tmp_path):
    runs = [gather(logged(tmp_path / str(seed), ROWS, f"seed={seed}")) for seed in (1, 2)]
    assert config_table(runs) == [("seed", ["1", "2"])]
    assert config_table(runs[:1]) == []


def test_a_folder_without_metrics_is_one_sentence(workdir):
    logged(workdir, [])
    with pytest.raises(ValueError, match="has not logged a step yet"):
        gather(workdir)
