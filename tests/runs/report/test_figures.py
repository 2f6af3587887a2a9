"""Figures hold the right curves: grouped, thinned out, and losses by noise level with intervals."""

import numpy as np
import pytest

from diffusion_jax.runs.report.figures import (
    BUCKETS,
    Line,
    curve_groups,
    curves,
    find_levels,
    level_figure,
    lines_of,
)
from diffusion_jax.runs.report.rows import Series


def series(*values):
    return Series(np.arange(1, len(values) + 1), np.asarray(values, np.float64))


def test_splits_averages_and_percentiles_share_a_figure():
    names = "train/loss val/loss val/loss_ema lr perf/s_p50 perf/s_p99 levels/00 levels/00_sigma"
    assert curve_groups(names.split()) == {
        "loss": ["train/loss", "val/loss", "val/loss_ema"],
        "lr": ["lr"],
        "perf/s": ["perf/s_p50", "perf/s_p99"],
    }


def test_curves_of_several_runs_are_coloured_by_run():
    one = {"val/loss": series(1), "val/loss_ema": series(2)}
    names = list(one)
    alone = lines_of({"a": one}, names)
    assert [(line.label, line.dashed) for line in alone] == [
        ("val/loss", False),
        ("val/loss_ema", True),
    ]
    assert alone[0].group == alone[1].group == "val/loss"
    both = lines_of({"a": one, "b": {"val/loss": series(3)}}, names)
    assert [line.label for line in both] == ["a: val/loss", "a: val/loss_ema", "b: val/loss"]
    assert [line.label for line in lines_of({"a": one, "b": one}, names[:1])] == ["a", "b"]
    assert [line.group for line in both] == ["a", "a", "b"]


LEVELS = {
    "levels/00_sigma": series(0.1, 0.1),
    "levels/01_sigma": series(2.0, 2.0),
    "levels/00": series(0.5, 0.25),
    "levels/01": series(0.9, 0.75),
    "levels/00_ci": series(0.1, 0.05),
    "levels/01_ci": series(0.1, 0.0625),
}


def test_levels_are_found_at_the_first_and_the_last_step():
    first, last = find_levels(LEVELS)
    assert (first.step, last.step) == (1, 2)
    assert last.sigmas.tolist() == [0.1, 2.0] and last.losses.tolist() == [0.25, 0.75]
    assert last.half.tolist() == [0.05, 0.0625] and first.losses.tolist() == [0.5, 0.9]
    assert find_levels(LEVELS, "_ema") == [] and find_levels({}) == []


def test_the_interval_of_a_level_is_drawn():
    pytest.importorskip("bokeh")
    assert level_figure({"a": {"lr": series(1.0)}}) is None
    plot = level_figure({"a": LEVELS})
    segments = [
        r.data_source.data for r in plot.renderers if r.glyph.__class__.__name__ == "Segment"
    ]
    assert [list(data["y0"]) + list(data["y1"]) for data in segments] == [
        [0.2, 0.6875, 0.3, 0.8125]
    ]


def test_a_long_curve_is_thinned_out_and_has_its_mean_on_top():
    pytest.importorskip("bokeh")
    values = np.zeros(100_000)
    values[54_321] = 7.0
    plot = curves("loss", [Line("train/loss", "a", series(*values)), Line("x", "b", series(1.0))])
    thin, mean, dot = [renderer.data_source.data for renderer in plot.renderers]
    assert len(thin["y"]) <= 2 * BUCKETS + 2 and max(thin["y"]) == 7.0
    assert len(mean["y"]) < 200 and max(mean["y"]) < 0.1 and list(dot["y"]) == [1.0]
