"""The playground in a headless Chromium, with a run of the demo that was really trained."""

import io
import re
import signal
import threading

import numpy as np
import pytest
import uvicorn
from PIL import Image
from support.browser import PATIENCE, chromium, overflow, tab, until
from support.commands import start, succeed
from support.experiments import built

from diffusion_jax.pipeline import Pipeline
from diffusion_jax.serve.app import listen, make_app

pytestmark = pytest.mark.browser
STATUS = "document.getElementById('status').textContent"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground") / "digits"
    train = ("--config=configs/mnist.py:tiny", f"--workdir={folder}", "--no_test")
    succeed(*train, "--config.hooks.images=None", devices=1)
    return folder


def served(*arguments):
    """Start `serve` -> (its process, the address that it prints)."""
    process = start("serve", "--port=0", *arguments, devices=1)
    watchdog = threading.Timer(PATIENCE / 1000, process.kill)
    watchdog.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"open (http://\S+)", line):
            watchdog.cancel()
            return process, found[1]
    raise AssertionError("".join(said))


@pytest.fixture(scope="module")
def address(workdir):
    process, found = served(f"--workdir={workdir}")
    yield found
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(30) in (0, -signal.SIGINT)
    finally:
        process.kill()


def ready(page, address):
    page.goto(address)
    until(page, "!document.getElementById('draw').disabled")


def ask(page, **fields):
    for name, value in fields.items():
        box = page.locator(f"#{name}")
        if name in ("class", "sampler"):
            box.select_option(str(value))
        else:
            box.fill(str(value))
    page.click("#draw")


def pictures(page, count):
    """Wait until the newest pictures are there -> uint8 [count h w]."""
    until(page, "!document.getElementById('draw').disabled")
    assert page.evaluate(STATUS) == ""
    links = page.locator(".batch:first-child .images a")
    assert links.count() == count
    return np.stack([read(page, links.nth(i)) for i in range(count)])


def read(page, link):
    return np.asarray(Image.open(io.BytesIO(download(page, link))))


def download(page, link):
    with page.expect_download() as found:
        link.click()
    return found.value.path().read_bytes()


def test_digits_are_drawn_as_the_run_draws_them(browser, address, workdir):
    """Class, steps, guidance, sampler and seed all arrive, and the page asks nobody else."""
    pipe = Pipeline.from_workdir(str(workdir), overrides=["--config.sampler.name=euler"])
    with tab(browser) as (page, heard):
        ready(page, address)
        assert "28 x 28 x 1" in page.locator("#about").text_content()
        asked = {"n": 3, "num_steps": 5, "guidance_scale": 1.5, "seed": 11}
        ask(page, **asked, **{"class": "7"}, sampler="euler")
        expected = pipe("7", **asked)[..., 0].astype(int)
        drawn = pictures(page, 3).astype(int)
        assert np.abs(drawn - expected).max() <= 1  # other devices round otherwise
        grid = download(page, page.get_by_text("download as one picture"))
        opened = Image.open(io.BytesIO(grid))
        assert "Steps: 5, Sampler: euler, CFG scale: 1.5, Seed: 11" in opened.text["parameters"]
        np.testing.assert_array_equal(np.asarray(opened)[2:30, 32:60], drawn[1])
        ask(page, seed=12)
        assert (pictures(page, 3) != drawn).any()
        assert page.locator(".batch").count() == 2
        assert heard.errors == [] and heard.outside(address) == []


def test_an_image_is_kept_where_its_mask_is_white(browser, address, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)
    mask = np.zeros((28, 28), np.uint8)
    mask[:, :14] = 255
    for name, pixels in (("image", image), ("mask", mask)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    with tab(browser) as (page, heard):
        ready(page, address)
        page.get_by_text("Begin with an image").click()
        for name in ("image", "mask"):
            page.set_input_files(f"#{name}", tmp_path / f"{name}.png")
        ask(page, n=1, num_steps=4, strength=1)
        (drawn,) = pictures(page, 1)
        np.testing.assert_array_equal(drawn[:, :14], image[:, :14])
        assert (drawn[:, 14:] != image[:, 14:]).mean() > 0.5
        assert heard.errors == []


def test_steps_are_seen_two_wait_in_a_queue_and_one_is_stopped(browser, address):
    with tab(browser) as (first, heard), tab(browser) as (second, _):
        ready(first, address)
        ready(second, address)
        ask(first, n=64, num_steps=1000)
        until(first, f"/^step [1-9][0-9]* of 1000$/.test({STATUS})")
        assert 0 < first.evaluate("document.getElementById('progress').value") < 1000
        ask(second, n=2, num_steps=5)
        until(second, f"{STATUS} === 'waiting, 1 before'")
        begun = first.evaluate("document.getElementById('progress').value")
        until(first, f"document.getElementById('progress').value > {begun}")
        first.click("#stop")
        until(first, f"{STATUS} === 'stopped'")
        assert first.locator(".batch").count() == 0
        assert pictures(second, 2).shape == (2, 28, 28)
        assert heard.errors == []


def test_too_many_images_are_refused(browser, address):
    with tab(browser) as (page, heard):
        ready(page, address)
        ask(page, n=65)
        assert page.evaluate("!document.getElementById('n').checkValidity()")
        assert not [a for a in heard.addresses if "/api/jobs" in a]
        page.evaluate("document.getElementById('form').noValidate = true")
        page.click("#draw")
        until(page, f"{STATUS} === 'n = 65 should be between 1 and 64'")
        assert page.locator("#status").get_attribute("class") == "error"
        assert not page.locator("#draw").is_disabled()


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize(("scheme", "low", "high"), [("dark", 0, 60), ("light", 240, 255)])
def test_it_fits_any_width_and_follows_the_light(browser, address, width, scheme, low, high):
    with tab(browser, width, scheme) as (page, heard):
        ready(page, address)
        page.get_by_text("Begin with an image").click()
        assert overflow(page) == 0
        ask(page, n=6, num_steps=4)
        pictures(page, 6)
        assert overflow(page) == 0
        pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
        assert low <= np.median(pixels) <= high and np.ptp(pixels) > 150
        assert heard.errors == []


def test_who_comes_from_outside_needs_the_token(browser, workdir):
    process, address = served(f"--workdir={workdir}", "--host=0.0.0.0")
    address = address.replace("0.0.0.0", "127.0.0.1")
    home, token = address.split("#")
    try:
        assert len(token) > 16
        for wrong in (home, f"{home}#{token[:-1]}"):
            with tab(browser) as (page, _):
                page.goto(wrong)
                until(page, f"{STATUS}.startsWith('open the address that the program')")
                assert page.locator("#draw").is_disabled()
        with tab(browser) as (page, heard):
            ready(page, address)
            ask(page, n=2, num_steps=4)
            assert pictures(page, 2).shape == (2, 28, 28)
            assert heard.errors == [] and heard.outside(home) == []
    finally:
        process.kill()


def test_a_model_of_texts_asks_for_a_prompt(browser):
    experiment = built("configs/emoji.py:tiny", devices=1)
    pipe = Pipeline(experiment, experiment.init_state().params, experiment.random_frozen())
    with listen("127.0.0.1", 0) as listener:
        app = make_app(lambda sampler: pipe, None, ["127.0.0.1"], "emoji")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with tab(browser, 390) as (page, heard):
                ready(page, f"http://127.0.0.1:{listener.getsockname()[1]}/")
                assert not page.locator("#class").is_visible()
                ask(page, text="a <b>red</b> fox", negative="blue", n=1, num_steps=3)
                drawn = pictures(page, 1)
                expected = pipe("a <b>red</b> fox", negative="blue", n=1, num_steps=3)
                np.testing.assert_array_equal(drawn, expected)
                caption = page.locator(".batch p").text_content()
                assert caption == "a <b>red</b> fox · seed 0 · 3 steps"
                assert overflow(page) == 0 and heard.errors == []
        finally:
            server.should_exit = True
            thread.join(30)
