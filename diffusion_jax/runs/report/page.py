"""The page of a report: one HTML file that needs no network, and the same as JSON."""

import importlib.util
import json
import math
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.data.whole_files import whole_file
from diffusion_jax.runs.report.about import about, labels, number
from diffusion_jax.runs.report.embedding import MAX_BYTES, embedded
from diffusion_jax.runs.report.figures import BUCKETS, curve_groups, curves, level_figure, lines_of
from diffusion_jax.runs.report.gathering import Gathered, config_table
from diffusion_jax.runs.report.rows import Series, same_series, summary, thin_out
from diffusion_jax.runs.report.text import few

PAGE = "report.html"
# The first line of every page, by which a file is known as a report.
MARK = "<!doctype html><!-- report of diffusion_jax -->"
MISSING = "the report page needs bokeh: pip install bokeh"
_MEMORISATION = ("copied_", "nearest_ratio_")


def can_draw() -> bool:
    """Tell whether the packages are installed that a page is made with."""
    return all(importlib.util.find_spec(name) is not None for name in ("bokeh", "jinja2"))


def write_page(path: pathlib.Path, runs: Sequence[Gathered], program: str) -> pathlib.Path:
    """Write the page of one or more runs, whole or not at all, and return its path.

    program: what a user types before a command. Raises ImportError when a package is missing, and
    ValueError when the path is another kind of file.
    """
    if not can_draw():
        raise ImportError(MISSING)
    check_page(path)
    _write(path, make_page(runs, program))
    return path


def check_page(path: pathlib.Path) -> None:
    """Raise ValueError when a page would take the place of something that is no report."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder and should be the name of a new .html file")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(MARK)) != MARK.encode():
                raise ValueError(f"{path} exists and is not a report; choose another --out")


def make_page(runs: Sequence[Gathered], program: str) -> str:
    """Make the HTML of the page of one or more runs."""
    import jinja2
    from bokeh.embed import components
    from bokeh.resources import Resources

    series = dict(zip(labels(runs), (run.metrics.series for run in runs), strict=True))
    sections = _figures(series)
    plots = {f"{i}/{j}": p for i, s in enumerate(sections) for j, p in enumerate(s["plots"])}
    script, divs = components(plots) if plots else ("", {})
    for i, section in enumerate(sections):
        section["divs"] = [divs[f"{i}/{j}"] for j in range(len(section.pop("plots")))]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffusion_jax.runs.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        mark=MARK,
        labels=labels(runs),
        runs=runs,
        about=about(runs),
        sections=sections,
        script=script,
        library=Resources("inline", components=["bokeh"]).render_js(),
        differences=config_table(runs) if len(runs) > 1 else [],
        notes=_notes(runs),
        scores=[score_table(run) for run in runs],
        pictures=[embedded(run, MAX_BYTES // len(runs)) for run in runs],
        commands=[commands(run, program) for run in runs],
        memorisation=_MEMORISATION,
        number=number,
        few=few,
    )


def make_json(runs: Sequence[Gathered]) -> dict[str, Any]:
    """Describe runs in values that JSON can hold; NaN and the infinities are texts."""
    return {
        "runs": [
            {
                "folder": str(run.folder),
                "state": run.state,
                "step": run.step,
                "num_steps": run.total,
                "seconds": run.seconds,
                "images_seen": run.images_seen,
                "starts": run.starts,
                "facts": run.facts,
                "config": {path: _json(value) for path, value in run.config.items()},
                "differs": run.differs,
                "changes": [_json(change) for change in run.changes],
                "forked_from": run.forked_from,
                "best": None if run.best is None else _json(run.best._asdict()),
                "checkpoints": {step: _json(found) for step, found in run.checkpoints.items()},
                "metrics": {name: _described(s) for name, s in run.metrics.series.items()},
                "unreadable_lines": run.metrics.unreadable,
                "pictures": {
                    name: {str(step): str(path) for step, path in files}
                    for name, files in run.pictures.items()
                },
            }
            for run in runs
        ],
        "config_differences": dict(config_table(runs)) if len(runs) > 1 else {},
    }


def write_json(path: pathlib.Path, runs: Sequence[Gathered]) -> pathlib.Path:
    """Write what a report tells as JSON, whole or not at all, and return its path."""
    if path.exists() and (path.is_dir() or not path.read_bytes()[:9].startswith(b'{"runs": ')):
        raise ValueError(f"{path} exists and is not a report; choose another --json")
    _write(path, json.dumps(make_json(runs), allow_nan=False))
    return path


def score_table(run: Gathered) -> list[tuple[int, dict[str, float]]]:
    """List (step, {name: value}) of the metrics of samples, with the memorisation at its end."""
    found: dict[int, dict[str, float]] = {}
    for name, series in run.metrics.series.items():
        if name.startswith("metrics/") and not name.endswith("time_share"):
            for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                found.setdefault(step, {})[name.removeprefix("metrics/")] = value
    order = lambda item: (item[0].startswith(_MEMORISATION), item[0])  # noqa: E731
    return [(step, dict(sorted(found[step].items(), key=order))) for step in sorted(found)]


def commands(run: Gathered, program: str) -> list[dict[str, Any]]:
    """List the checkpoints, the best one first, with the command that draws or evaluates each."""
    verb = "sample" if run.draws else "evaluate"
    best = None if run.best is None else run.best.step
    order = sorted(run.checkpoints, key=lambda step: (step != best, -step))
    return [
        {
            "step": step,
            "best": step == best,
            "scores": run.checkpoints[step],
            "command": f"{program} {verb} --workdir={shlex.quote(str(run.folder))} --step={step}",
        }
        for step in order
    ]


def _figures(series: Mapping[str, Mapping[str, Series]]) -> list[dict[str, Any]]:
    """Draw all figures -> sections {"title", "plots"}; series that are the same are drawn once."""
    # A name is left out if another one has the same values in every run that has it.
    names = {name for found in series.values() for name in same_series(dict(found))}
    sections: dict[str, list[Any]] = {"Losses": [], "Metrics of samples": [], "Speed and more": []}
    for base, members in curve_groups(sorted(names)).items():
        lines = lines_of(series, members)
        if all(len(line.series.steps) < 2 for line in lines):
            continue
        if base.startswith("metrics/"):
            kind = "Metrics of samples"
        else:
            kind = "Losses" if "loss" in base else "Speed and more"
        sections[kind].append(curves(base, lines))
    levels = level_figure(series)
    if levels is not None:
        sections["Losses"].insert(0, levels)
    return [{"title": title, "plots": plots} for title, plots in sections.items() if plots]


def _notes(runs: Sequence[Gathered]) -> list[str]:
    """Say what a reader should know about the curves: damage, and values that are no numbers."""
    notes = []
    for label, run in zip(labels(runs), runs, strict=True):
        if run.metrics.unreadable:
            notes.append(
                f"{label}: metrics.jsonl is damaged; lines left out: {few(run.metrics.unreadable)}"
            )
        for name, series in run.metrics.series.items():
            bad = summary(series)["not_finite"]
            if bad:
                notes.append(f"{label}: {name} is not finite {bad:,} x")
    return notes


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def _described(series: Series) -> dict[str, Any]:
    shown = thin_out(series, BUCKETS)
    return _json(
        {**summary(series), "steps": shown.steps.tolist(), "values": shown.values.tolist()}
    )


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
