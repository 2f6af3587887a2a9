"""The report's page in a headless Chromium: light and dark, narrow and wide, without a network."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from support.reports import logged, picture

from diffusion_jax.runs.report.gathering import gather
from diffusion_jax.runs.report.page import make_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]
# Looks at the page in the frame, moves its slider to the beginning, and leaves what it saw behind.
LOOK = """
<script>
addEventListener("load", () => setTimeout(() => {
  const {contentDocument: page, contentWindow: inside} = document.querySelector("iframe");
  const [slider, image] = [page.querySelector("#step"), page.querySelector("figure img")];
  const seen = {
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    plots: page.querySelectorAll(".bk-Figure").length,
    canvases: [...page.querySelectorAll(".bk-Figure")].filter(
      plot => plot.shadowRoot && plot.getBoundingClientRect().height > 200).length,
    last: [page.querySelector("#shown").textContent, image.src, image.naturalWidth],
    captions: [...page.querySelectorAll("figure ol li")].map(item => item.textContent),
    outside: inside.performance.getEntriesByType("resource")
      .map(entry => entry.name).filter(name => !name.startsWith("data:")),
  };
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  seen.first = [page.querySelector("#shown").textContent, image.src];
  const told = document.createElement("pre");
  told.id = "seen";
  told.textContent = JSON.stringify(seen);
  document.body.append(told);
}, 3000));
</script>
"""


def browse(path, *options, width, height=1200):
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=8000", *options]
    command += [f"--window-size={width},{height}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in said if re.search(r"(?i)uncaught|refused|violat|error", line)]
    return done.stdout


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
def test_it_shows_everything_in_any_width_and_loads_nothing(page, width):
    inside = html.escape(page.read_text(), quote=True)
    wrapped = page.with_name(f"in_a_frame_{width}.html")
    style = f"border:0;width:{width}px;height:1000px"
    wrapped.write_text(
        f'<body style="margin:0"><iframe srcdoc="{inside}" style="{style}"></iframe>{LOOK}'
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', browse(wrapped, "--dump-dom", width=1400))
    assert found is not None, "the page was not looked at"
    seen = json.loads(html.unescape(found[1]))
    assert seen["overflow"] == 0 and seen["outside"] == []
    assert seen["plots"] == seen["canvases"] == 3  # levels, loss, learning rate
    assert seen["last"][0] == "8" and seen["last"][2] == 2 and seen["first"][0] == "4"
    assert seen["last"][1] != seen["first"][1] and seen["first"][1].startswith("data:image/png")
    assert seen["captions"] == ["a <b>red</b> fox"] * 2


@pytest.mark.parametrize(("scheme", "low", "high"), [(0, 0, 60), (1, 240, 255)])
def test_it_follows_the_light_of_the_system(page, scheme, low, high):
    shot = page.with_name(f"shot{scheme}.png")
    browse(
        page, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}", width=800
    )
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert low <= np.median(pixels) <= high and np.ptp(pixels) > 150
