"""The page holds all that it shows, tells what the run is, and takes no other file's place."""

import importlib.util
import json
import re
import time

import numpy as np
import pytest
from support.reports import logged, odd_rows, picture

from diffusion_jax.runs.report import page
from diffusion_jax.runs.report.gathering import gather
from diffusion_jax.runs.report.page import (
    MARK,
    commands,
    make_json,
    make_page,
    score_table,
    write_json,
    write_page,
)
from diffusion_jax.runs.report.text import text_report

EVIL = "</script><b>&'\""
ROWS = [
    {"step": 4, "time": 60.0, "train/loss": 4.0, f"val/{EVIL}": 0.5, "metrics/mind_x": 2.0},
    {
        "step": 8,
        "time": 70.0,
        "train/loss": "NaN",
        f"val/{EVIL}": 0.7,
        "metrics/mind_x": 1.0,
        "metrics/copied_x": 0.25,
        "metrics/time_share": 0.01,
    },
]
needs_bokeh = pytest.mark.skipif(
    importlib.util.find_spec("bokeh") is None, reason="needs bokeh: pip install bokeh"
)


@needs_bokeh
def test_the_page_is_whole_in_itself_and_escapes_what_it_shows(tmp_path):
    runs = [
        gather(logged(tmp_path / f"{n}{EVIL.replace('/', '')}", ROWS, f"seed={n}")) for n in "12"
    ]
    picture(runs[0].folder, "val/samples", 4)
    html = make_page([gather(run.folder) for run in runs], "python launch.py")
    assert html.startswith(MARK)
    own = re.sub(r"<script(?! type=.application/json).*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!#|data:)\w""", own)
    assert "default-src 'none'" in own and EVIL not in html and "<b>" not in own
    assert "data:image/png;base64," in own
    for text in ("seed", "train/loss is not finite 1 x", "copied_x", "8 of 8"):
        assert text in own


def test_memorisation_stands_behind_the_metrics(workdir):
    found = score_table(gather(logged(workdir, ROWS)))
    assert found == [(4, {"mind_x": 2.0}), (8, {"mind_x": 1.0, "copied_x": 0.25})]
    assert list(found[1][1]) == ["mind_x", "copied_x"]


def test_the_best_checkpoint_comes_first_with_its_command(workdir):
    rows = [{"step": s, "val/loss_simple_ema": v} for s, v in ((4, 0.5), (6, 0.4), (8, 0.7))]
    run = gather(logged(workdir, rows))
    run = run._replace(checkpoints={step: {} for step in (4, 6, 8)})
    found = commands(run, "launch.py")
    assert [item["step"] for item in found] == [6, 8, 4]
    assert found[0]["best"] and not found[1]["best"]
    assert found[0]["command"] == f"launch.py sample --workdir={workdir} --step=6"
    run = run._replace(draws=False)
    assert commands(run, "launch.py")[0]["command"].startswith("launch.py evaluate ")


def test_json_holds_the_numbers(workdir, tmp_path):
    run = gather(logged(workdir, ROWS))
    path = write_json(tmp_path / "new" / "x.json", [run])
    (told,) = json.loads(path.read_text())["runs"]
    assert told["step"] == 8 and told["metrics"]["train/loss"]["values"] == [4.0, "NaN"]
    assert told["metrics"]["train/loss"]["lowest"] == 4.0 and told["config"]["seed"] == 0
    write_json(path, [run])  # takes its own place
    both = [run, run._replace(config={**run.config, "seed": 3})]
    assert make_json(both)["config_differences"] == {"seed": ["0", "3"]}


@pytest.mark.parametrize("write", [write_json, lambda p, runs: write_page(p, runs, "launch.py")])
def test_another_file_is_left_alone(workdir, tmp_path, monkeypatch, write):
    monkeypatch.setattr(page, "can_draw", lambda: True)
    run = gather(logged(workdir, ROWS))
    (tmp_path / "mine").write_text('{"mine": 1}')
    for path in (tmp_path / "mine", tmp_path):
        with pytest.raises(ValueError, match="is not a report|is a folder"):
            write(path, [run])
    assert (tmp_path / "mine").read_text() == '{"mine": 1}'


def test_without_bokeh_it_says_how_to_get_it(workdir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs bokeh: pip install bokeh"):
        write_page(workdir / "x.html", [gather(logged(workdir, ROWS))], "launch.py")


@needs_bokeh
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", odd_rows())
def test_runs_that_went_wrong_are_reported_without_a_warning(workdir, name):
    logged(workdir, odd_rows()[name])
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "train/l')
    run = gather(workdir)
    assert make_page([run, run], "launch.py").startswith(MARK) and len(text_report(run)) > 4
    assert "NaN" not in json.dumps(make_json([run]), allow_nan=False).replace('"NaN"', "")


@needs_bokeh
@pytest.mark.slow
def test_a_hundred_thousand_steps_take_less_than_three_seconds(workdir):
    noise = np.random.default_rng(0).normal(size=(100_000, 8)).tolist()
    names = [f"train/loss_{i}" for i in range(8)]
    rows = [{"step": i + 1, **dict(zip(names, row, strict=True))} for i, row in enumerate(noise)]
    logged(workdir, rows)
    started = time.process_time()
    html = make_page([gather(workdir)], "launch.py")
    assert time.process_time() - started < 3 and len(html) < 5e6
