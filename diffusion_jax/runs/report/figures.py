"""The figures of a report, drawn by Bokeh: curves over the steps, and the loss by noise level."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.runs.report.rows import Series, bucket_means, thin_out

# Colours and greys that can be read on white and on black.
COLOURS = "#3b82f6 #e8590c #2f9e44 #ae3ec9 #e03131 #0c8599 #b08900 #868e96".split()
_GREY = "#8a8f98"
# Values of a curve that are drawn: about twice as many as a screen has pixels.
BUCKETS = 1000
_SMOOTH = 150
_SMOOTH_FROM = 400
_SPLITS = ("train/", "val/", "test/")
_QUANTILE = re.compile(r"_p\d+$")
_LEVEL = re.compile(r"levels/(\d+)_sigma")


class Line(NamedTuple):
    """One curve of a figure; group chooses its colour, dashed is for averaged weights."""

    label: str
    group: str
    series: Series
    dashed: bool = False


class Levels(NamedTuple):
    """The loss by noise level at one step; half: half the width of its confidence interval."""

    sigmas: np.ndarray
    losses: np.ndarray
    half: np.ndarray
    step: int


def curve_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Put the names of metrics into figures: "loss" holds train/loss, val/loss, val/loss_ema.

    Percentiles, such as perf/step_seconds_p50 and _p90, share a figure too. Losses by noise level,
    which have a figure of their own, are left out.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if name.startswith("levels/"):
            continue
        base = _QUANTILE.sub("", name.removesuffix("_ema"))
        for split in _SPLITS:
            base = base.removeprefix(split)
        found.setdefault(base, []).append(name)
    return found


def lines_of(runs: Mapping[str, Mapping[str, Series]], names: Sequence[str]) -> list[Line]:
    """Choose the curves of one figure: all names of all runs, coloured by run if there are more."""
    several = len(runs) > 1
    return [
        Line(
            (label if len(names) == 1 else f"{label}: {name}") if several else name,
            label if several else name.removesuffix("_ema"),
            series[name],
            name.endswith("_ema"),
        )
        for label, series in runs.items()
        for name in names
        if name in series
    ]


def find_levels(series: Mapping[str, Series], ending: str = "") -> list[Levels]:
    """Find the loss by noise level at the first and the last step that have one.

    ending: "_ema" for the averaged weights.
    """
    numbers = sorted(match[1] for name in series if (match := _LEVEL.fullmatch(name)))
    numbers = [number for number in numbers if f"levels/{number}{ending}" in series]
    if not numbers:
        return []
    steps = series[f"levels/{numbers[0]}{ending}"].steps
    return [
        Levels(
            np.asarray([_at(series, f"levels/{number}_sigma", step) for number in numbers]),
            np.asarray([_at(series, f"levels/{number}{ending}", step) for number in numbers]),
            np.asarray([_at(series, f"levels/{number}_ci{ending}", step) for number in numbers]),
            step,
        )
        for step in dict.fromkeys([int(steps[0]), int(steps[-1])])
    ]


def curves(title: str, lines: Sequence[Line]) -> Any:
    """Draw curves over the steps; a long one is thinned out, with its mean on top."""
    plot = _figure(title, "step")
    colours = _colours(line.group for line in lines)
    alone = len(lines) == 1 and lines[0].label.endswith(title)
    for line in lines:
        options: dict[str, Any] = {"color": colours[line.group], "name": line.label}
        if not alone:
            options["legend_label"] = line.label
        steps, values = _shown(thin_out(line.series, BUCKETS))
        if len(values) == 1:
            plot.scatter(steps, values, size=8, fill_alpha=0.0 if line.dashed else 1.0, **options)
            continue
        options["line_dash"] = "dashed" if line.dashed else "solid"
        long = len(line.series.values) > _SMOOTH_FROM
        plot.line(steps, values, line_width=1 if long else 2, alpha=0.3 if long else 1.0, **options)
        if long:
            plot.line(*_shown(bucket_means(line.series, _SMOOTH)), line_width=2, **options)
    return _finished(plot)


def level_figure(runs: Mapping[str, Mapping[str, Series]]) -> Any | None:
    """Draw the loss by noise level with its confidence interval; None if no run has one.

    The last step that has one is drawn, and the first one faintly if there is one run.
    """
    found = [
        (label, ending, levels)
        for label, series in runs.items()
        for ending in ("", "_ema")
        for levels in find_levels(series, ending)[0 if len(runs) == 1 else -1 :]
    ]
    if not found:
        return None
    plot = _figure("loss by noise level", "noise level sigma", x_axis_type="log")
    newest = {(label, ending): levels.step for label, ending, levels in found}
    colours = _colours(label if len(runs) > 1 else ending for label, ending, _ in found)
    for label, ending, levels in found:
        old = levels.step != newest[label, ending]
        name = f"{'averaged' if ending else 'raw'} weights, step {levels.step:,}"
        name = f"{label}: {name}" if len(runs) > 1 else name
        colour = colours[label if len(runs) > 1 else ending]
        options = {"color": colour, "legend_label": name, "name": name, "alpha": 0.4 if old else 1}
        dash = "dashed" if ending else "solid"
        plot.line(levels.sigmas, levels.losses, line_width=2, line_dash=dash, **options)
        plot.scatter(levels.sigmas, levels.losses, size=5, **options)
        if not old:
            low, high = levels.losses - levels.half, levels.losses + levels.half
            plot.segment(levels.sigmas, low, levels.sigmas, high, color=colour, name=name)
    return _finished(plot)


def _shown(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Round to float32, so that a mean of equal values is drawn as equal."""
    with np.errstate(over="ignore"):  # infinite then, and not drawn
        return series.steps, series.values.astype(np.float32)


def _at(series: Mapping[str, Series], name: str, step: int) -> float:
    if name not in series:
        return float("nan")
    found = series[name]
    values = found.values[found.steps == step]
    return float(values[-1]) if len(values) else float("nan")


def _colours(groups: Any) -> dict[str, str]:
    return dict(zip(dict.fromkeys(groups), itertools.cycle(COLOURS)))


def _figure(title: str, x_label: str, **options: Any) -> Any:
    from bokeh.models import BasicTickFormatter, BoxZoomTool, HoverTool, NumeralTickFormatter, Title
    from bokeh.plotting import figure

    zoom = BoxZoomTool(dimensions="width")
    hover = HoverTool(tooltips=[("", "$name"), (x_label, "@x"), ("value", "@y{0.00000}")])
    plot = figure(
        title=Title(text=title, text_color=_GREY, text_font_size="14px"),
        frame_height=230,
        sizing_mode="stretch_width",
        tools=[zoom, hover, "pan", "wheel_zoom", "reset", "save"],
        active_drag=zoom,
        active_scroll=None,
        window_axis="x",
        output_backend="canvas",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=48,
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xaxis.axis_label = x_label
    if x_label == "step":
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.yaxis.formatter = BasicTickFormatter(power_limit_low=-5, power_limit_high=6)
    plot.axis.axis_label_text_color = plot.axis.major_label_text_color = _GREY
    plot.axis.axis_line_color = plot.axis.major_tick_line_color = _GREY
    plot.axis.minor_tick_line_color = None
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = _GREY, 0.25
    return plot


def _finished(plot: Any) -> Any:
    """Put the legend, if there is one, below the curves."""
    for legend in list(plot.legend):
        legend.background_fill_color = legend.border_line_color = None
        legend.label_text_color, legend.label_text_font_size = _GREY, "12px"
        legend.click_policy, legend.location = "hide", "left"
        legend.spacing, legend.padding, legend.margin = 0, 2, 0
        plot.add_layout(legend, "below")
    return plot
