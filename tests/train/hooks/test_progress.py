import io
import re
import time

import numpy as np

from diffusion_jax.train.hooks import progress as module
from diffusion_jax.train.hooks.progress import progress
from diffusion_jax.train.hooks.scalars import Speed
from diffusion_jax.train.loop import train


class State:
    def __init__(self, step):
        self.step = step


def run(hook, num_steps, pause=0.0, first=0):
    def step(state, batch):
        time.sleep(pause)
        return State(state.step + 1), {"loss": np.float32(state.step + 1)}

    train(State(first), step, iter(int, 1), [hook], num_steps=num_steps)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    run(progress(num_steps=10, speed=Speed(8, 1), every=4, stream=out), 10, pause=0.01)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/10 (10%)",
        "step 4/10 (40%)",
        "step 8/10 (80%)",
        "step 10/10 (100%)",
    ]
    assert "loss 8.0000" in lines[2]
    speed = re.search(r"([\d.]+) images/s", lines[2])
    assert speed is not None and 80 < float(speed[1]) <= 800
    assert "0:00:00 to go" in lines[3]
    assert "images/s" not in lines[0] and "\r" not in out.getvalue()


def test_utilisation_where_it_is_known():
    out = io.StringIO()
    speed = Speed(images=8, devices=1, flops=10**9, peak_flops=1e12)
    run(progress(num_steps=10, speed=speed, every=5, stream=out), 10, pause=0.01)
    line = out.getvalue().splitlines()[-1]
    images, mfu = re.search(r"([\d.]+) images/s", line), re.search(r"([\d.]+)% MFU", line)
    assert images is not None and mfu is not None
    assert abs(float(images[1]) / 8 * 0.1 - float(mfu[1])) < 0.1


def test_one_line_that_redraws_itself_on_a_terminal(monkeypatch):
    monkeypatch.setattr(module, "_REDRAW_SECONDS", 0.03)
    out = Terminal()
    run(progress(num_steps=20, stream=out), 20, pause=0.01)
    text = out.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    drawn = re.findall(r"\rstep (\d+)/20", text)
    assert drawn[0] == "1" and drawn[-1] == "20" and 4 < len(drawn) < 12
    assert "steps/s" in text


def test_it_reads_only_what_it_shows_and_late():
    reads = []

    class Fake:
        def __init__(self, step):
            self.step = step

        def __array__(self, *args, **kwargs):
            reads.append((self.step, dispatched[-1]))
            return np.float32(0)

    dispatched = []

    def step(state, batch):
        dispatched.append(state.step + 1)
        return State(state.step + 1), {"loss": Fake(state.step + 1)}

    hook = progress(num_steps=9, every=4, stream=io.StringIO())
    train(State(0), step, iter(int, 1), [hook], num_steps=9)
    assert reads == [(1, 2), (4, 5), (8, 9), (9, 9)]


def test_a_resumed_run_counts_its_own_steps_for_the_speed():
    out = io.StringIO()
    run(progress(num_steps=1010, every=5, stream=out), 1010, pause=0.01, first=1000)
    speed = re.search(r"([\d.]+) steps/s", out.getvalue().splitlines()[-1])
    assert speed is not None and float(speed[1]) <= 150


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    out = io.StringIO()
    run(progress(num_steps=3, stream=out), 3)
    assert out.getvalue() == ""
