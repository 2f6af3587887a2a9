"""`serve` in a process of its own: its address, and its sentences."""

import json
import re
import signal
import time
import urllib.request

import pytest
from support.commands import run, start

from diffusion_jax.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --workdir=RUN or --checkpoint=FILE"),
        (("--workdir=nowhere", "--port=99999"), "--port=99999 cannot be listened at"),
        (("--workdir=nowhere", "--port=0", "--lora=x:much"), "--lora=x:much should be FILE:WEIGHT"),
        (("--workdir=nowhere", "--port=0"), "nowhere is not the folder of a run"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch):
    code, said = run("serve", *arguments)
    assert code == 2 and message in said, said


def test_pictures_tell_which_loras_and_embeddings_drew_them(monkeypatch):
    made = []
    monkeypatch.setattr("diffusion_jax.serve.app.make_app", lambda *app: made.append(app))
    monkeypatch.setattr("diffusion_jax.serve.app.run_server", lambda app, listener: None)
    added = {}
    monkeypatch.setattr(
        "diffusion_jax.serve.loading.make_load", lambda *chosen, **more: added.update(more)
    )
    flags = "--lora=a/style.safetensors:0.8 --lora=b.safetensors --embedding=c/toy.pt:<t>".split()
    assert main(["serve", "--workdir=runs/x", "--port=0", *flags]) == 0
    assert added == {
        "loras": {"a/style.safetensors": 0.8, "b.safetensors": 1.0},
        "embeddings": [("c/toy.pt", "<t>")],
    }
    assert made[0][-1] == {
        "LoRA": "style.safetensors:0.8, b.safetensors:1",
        "Embeddings": "toy.pt:<t>",
    }


def ask(address, path, body=None):
    headers = {"Content-Type": "application/json"}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, content, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_a_run_is_served_and_draws_with_another_sampler(tmp_path):
    train = ("--config=configs/mnist.py:tiny", f"--workdir={tmp_path / 'run'}", "--no_test")
    code, said = run(*train, "--config.hooks.images=None", "--config.train.num_steps=2")
    assert code == 0, said
    process = start("serve", f"--workdir={tmp_path / 'run'}", "--port=0", devices=1)
    try:
        line = process.stdout.readline()
        while "open http" not in line:
            assert process.poll() is None and line, line
            line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        asked = {"condition": "7", "n": 1, "num_steps": 3, "sampler": "heun"}
        job = ask(address, "/api/jobs", asked)["id"]
        deadline = time.monotonic() + 120
        while (report := ask(address, f"/api/jobs/{job}"))["state"] in ("waiting", "drawing"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert report["state"] == "done" and report["images"] == 1, report
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()
