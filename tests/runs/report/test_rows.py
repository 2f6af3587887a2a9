"""Series are read whatever is damaged, and thinned out without losing what a plot shows."""

import json
import math

import numpy as np
import pytest

from diffusion_jax.runs.report.rows import (
    Series,
    bucket_means,
    last_step,
    read_metrics,
    same_series,
    summary,
    thin_out,
)


def series(values):
    return Series(np.arange(1, len(values) + 1), np.asarray(values, np.float64))


def test_rows_become_series_with_numbers_that_json_lacks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "time": 5.0, "loss": 2.0}, {"step": 3, "time": 6.0, "loss": "NaN", "lr": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_metrics(path)
    assert found.times.tolist() == [5.0, 6.0] and found.unreadable == []
    assert found.series["loss"].steps.tolist() == [1, 3]
    np.testing.assert_equal(found.series["loss"].values, [2.0, np.nan])
    assert found.series["lr"].steps.tolist() == [3] and last_step(found) == 3


def test_an_empty_file_and_an_unfinished_line_hold_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for content in (b"", b'{"step": 1, "lo', b"\xff\xfe"):
        path.write_bytes(content)
        found = read_metrics(path)
        assert found.series == {} and found.unreadable == [] and last_step(found) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", ['"NaN"', "NaN", "null", "1e30", "-1e30", "Infinity", "true"])
def test_a_step_or_a_time_that_is_none_is_left_out_without_a_warning(bad, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "time": 5, "loss": 2}}\n{{"step": {bad}, "loss": 3}}\n')
    found = read_metrics(path)
    if bad == "true":  # is 1
        assert found.series["loss"].steps.tolist() == [1, 1]
    else:
        assert found.series["loss"].steps.tolist() == [1] and found.unreadable == [2]
    path.write_text(f'{{"step": 1, "time": {bad}, "loss": 2}}\n{{"step": 2, "time": 6}}\n')
    found = read_metrics(path)
    assert 6.0 in found.times and np.isfinite(found.times).all() and found.times.max() == 6.0


@pytest.mark.parametrize("count", [5, 2001, 10_000])
def test_thinning_keeps_every_peak_of_every_part(count):
    values = np.random.default_rng(0).normal(size=count)
    values[count // 3] = np.nan
    found = thin_out(series(values), 100)
    assert len(found.values) <= max(count if count <= 200 else 0, 202)
    assert found.values[0] == values[0] and found.values[-1] == values[-1]
    assert (np.diff(found.steps) > 0).all() and np.isin(found.values, values).any()
    for part in np.array_split(
        np.arange(count), 50 if count > 200 else 1
    ):  # two parts of the hundred each
        of_part = np.isin(found.steps, part + 1)
        assert np.nanmax(found.values[of_part]) == np.nanmax(values[part])
        assert np.nanmin(found.values[of_part]) == np.nanmin(values[part])


def test_means_are_of_finite_values():
    found = bucket_means(series([1.0, 3.0, math.nan, 5.0, 9.0]), 2)
    assert found.values.tolist() == [2.0, 7.0] and found.steps.tolist() == [1, 4]
    assert len(bucket_means(series([math.nan]), 2).values) == 0


def test_a_summary_leaves_out_what_is_not_finite():
    found = summary(series([4.0, math.nan, 1.0, math.inf, 2.0]))
    assert (found["first"], found["lowest"], found["highest"], found["last"]) == (
        4.0,
        1.0,
        4.0,
        2.0,
    )
    assert (found["count"], found["not_finite"], found["last_step"]) == (5, 2, 5)


def test_equal_series_are_told_once():
    a, b = series([1.0, 2.0]), series([1.0, 2.0 * (1 + 1e-7)])
    found = same_series(
        {"b": b, "a": a, "c": series([1.0, 2.1]), "d": Series(a.steps + 1, a.values)}
    )
    assert found == {"a": ["b"], "c": [], "d": []}
