"""The report's page in a headless Chromium: light and dark, narrow and wide, without a network."""

import io
import time

import numpy as np
import pytest
from PIL import Image
from support.browser import chromium, overflow, tab, until
from support.reports import logged, odd_rows, picture

from diffusion_jax.runs.report.gathering import gather
from diffusion_jax.runs.report.page import make_page

pytestmark = pytest.mark.browser
# The figures of Bokeh that have been drawn.
DRAWN = """() => [...document.querySelectorAll(".bk-Figure")].filter(
  plot => plot.shadowRoot && plot.getBoundingClientRect().height > 200).length"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs of which one was trained for long."""
    folder = tmp_path_factory.mktemp("report")
    noise = np.random.default_rng(0).normal(size=20_000).tolist()
    rows = [{"step": i + 1, "train/loss": 3 + x, "lr": 1e-4} for i, x in enumerate(noise)]
    levels = {f"levels/0{i}{end}": 0.5 for i in range(3) for end in ("", "_ci")}
    levels |= {f"levels/0{i}_sigma": 10.0**i for i in range(3)}
    runs = [
        logged(folder / "a_rather_long_name_of_a_run", [*rows, {"step": 20_000, **levels}]),
        logged(folder / "b", rows[:10], "seed=3"),
    ]
    for run in runs:
        for step in (4, 8):
            picture(run, "val/samples", step, value=step)
            beside = picture(run, "val/conditioning", step).with_suffix(".txt")
            beside.write_text("a <b>red</b> fox\n")
    path = folder / "page.html"
    path.write_text(make_page([gather(run) for run in runs], "python launch.py"))
    return path


@pytest.mark.parametrize("width", [390, 1400])
def test_it_shows_everything_in_any_width_and_loads_nothing(browser, page, width):
    with tab(browser, width) as (seen, heard):
        seen.goto(page.as_uri())
        until(seen, f"({DRAWN})() === 3")  # levels, loss, learning rate
        assert overflow(seen) == 0 and seen.evaluate(DRAWN) == 3
        assert seen.evaluate("document.querySelectorAll('.bk-Figure').length") == 3
        shown, image = seen.locator("#shown"), seen.locator("figure img").first
        assert shown.text_content() == "8"
        assert image.evaluate("image => image.naturalWidth") == 2
        last = image.get_attribute("src")
        assert seen.locator("figure ol li").all_text_contents() == ["a <b>red</b> fox"] * 2
        seen.locator("#step").fill("0")
        first = image.get_attribute("src")
        assert shown.text_content() == "4"
        assert last != first and first.startswith("data:image/png")
        assert heard.errors == [] and heard.outside("file:") == []


@pytest.mark.parametrize(("scheme", "low", "high"), [("dark", 0, 60), ("light", 240, 255)])
def test_it_follows_the_light_of_the_system(browser, page, scheme, low, high):
    with tab(browser, 800, scheme) as (seen, heard):
        seen.goto(page.as_uri())
        until(seen, f"({DRAWN})() === 3")
        pixels = np.asarray(Image.open(io.BytesIO(seen.screenshot())).convert("L"))
        assert low <= np.median(pixels) <= high and np.ptp(pixels) > 150
        assert heard.errors == []


@pytest.mark.parametrize("name", odd_rows())
def test_runs_that_went_wrong_are_shown_without_an_error(browser, name, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(make_page([gather(logged(tmp_path / "run", odd_rows()[name]))], "launch.py"))
    with tab(browser) as (seen, heard):
        seen.goto(path.as_uri())
        count = seen.evaluate("document.querySelectorAll('.card').length")
        until(seen, f"({DRAWN})() === {count}")
        assert heard.errors == [] and overflow(seen) == 0


def test_100_000_steps_take_less_than_3_seconds_of_a_processor(browser, tmp_path):
    noise = np.random.default_rng(0).normal(size=(100_000, 4)).tolist()
    names = ("train/loss", "train/loss_ema", "train/grad_norm", "lr")
    rows = [
        {"step": i + 1, "time": i / 10, **dict(zip(names, values, strict=True))}
        for i, values in enumerate(noise)
    ]
    run, path = logged(tmp_path / "run", rows), tmp_path / "page.html"
    make_page([gather(logged(tmp_path / "short", rows[:10]))], "python launch.py")  # imports
    begun = time.process_time()
    path.write_text(make_page([gather(run)], "python launch.py"))
    made = time.process_time() - begun
    with tab(browser) as (seen, _):
        session = seen.context.new_cdp_session(seen)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        seen.goto(path.as_uri())
        until(seen, f"({DRAWN})() === 3")
        metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    print(f"made in {made:.2f} s, drawn in {metrics['TaskDuration']:.2f} s of a processor")
    assert 0 < made + metrics["TaskDuration"] < 3
