"""Requests to the playground as a page and as strangers make them, without a browser."""

import asyncio
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from support.experiments import built

from diffusion_jax.pipeline import Pipeline
from diffusion_jax.serve.app import FILES, MOST_BYTES, listen, make_app

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def pipe():
    experiment = built("configs/mnist.py:tiny")
    return Pipeline(experiment, experiment.init_state().params, experiment.random_frozen())


@pytest.fixture(scope="module")
def app(pipe):
    return make_app(lambda sampler: pipe, None, [HOST], "digits")


def call(app, method, path, body=None, *, raw=None, **headers):
    """One request -> (status, headers, body), as a server would make it of bytes."""
    content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    headers = {"host": HOST, "content-type": "application/json"} | headers
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "server": (HOST, 80), "client": (HOST, 1),
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    sent = []

    async def receive():
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def finished(app, job, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        report = json.loads(call(app, "GET", f"/api/jobs/{job}")[2])
        if report["state"] not in ("waiting", "drawing"):
            return report
        time.sleep(0.05)
    raise AssertionError(report)


def test_the_page_is_three_files_that_load_nothing_from_elsewhere(app):
    for path in FILES:
        status, headers, body = call(app, "GET", path)
        assert status == 200 and b"http://" not in body and b"https://" not in body
        assert "default-src 'none'" in headers["content-security-policy"]
    assert call(app, "GET", "/page.py")[0] == call(app, "GET", "/../app.py")[0] == 404


def test_a_call_draws_what_the_pipeline_draws(app, pipe):
    about = json.loads(call(app, "GET", "/api/model")[2])
    assert about["takes"] == "class" and about["classes"] == [str(i) for i in range(10)]
    asked = {"condition": "7", "n": 2, "num_steps": 3, "seed": 5, "guidance_scale": 2}
    status, _, body = call(app, "POST", "/api/jobs", asked)
    assert status == 200
    report = finished(app, json.loads(body)["id"])
    assert report["state"] == "done" and report["images"] == 2, report
    expected = pipe("7", n=2, num_steps=3, seed=5, guidance_scale=2.0)
    for index in range(2):
        png = call(app, "GET", f"/api/jobs/{report['id']}/{index}.png")[2]
        image = np.asarray(Image.open(io.BytesIO(png)))
        np.testing.assert_array_equal(image, expected[index, ..., 0])
    assert call(app, "GET", f"/api/jobs/{report['id']}/2.png")[0] == 404
    grid = Image.open(io.BytesIO(call(app, "GET", f"/api/jobs/{report['id']}/grid.png")[2]))
    np.testing.assert_array_equal(np.asarray(grid)[2:30, 32:60], expected[1, ..., 0])
    for told in (Image.open(io.BytesIO(png)).text["parameters"], grid.text["parameters"]):
        assert told.startswith("7\nSteps: 3, Sampler: ddim, CFG scale: 2, Seed: 5, Size: 28x28")
        assert "Model: digits" in told
    assert call(app, "GET", "/api/jobs/another/grid.png")[0] == 404


def test_a_call_is_stopped_and_the_next_one_draws(app):
    asked = {"condition": "1", "n": 1, "num_steps": 900}
    job = json.loads(call(app, "POST", "/api/jobs", asked)[2])["id"]
    second = json.loads(call(app, "POST", "/api/jobs", asked | {"num_steps": 3, "n": 2})[2])["id"]
    assert json.loads(call(app, "GET", f"/api/jobs/{second}")[2])["before"] == 1
    call(app, "DELETE", f"/api/jobs/{job}")
    assert finished(app, job)["state"] == "stopped"
    assert finished(app, second)["state"] == "done"


def test_what_cannot_be_read_is_one_sentence(app):
    for asked, message in (({"n": 65}, "n = 65 should be"), ([1], "should be an object of fields")):
        status, _, body = call(app, "POST", "/api/jobs", asked)
        assert status == 400 and message in json.loads(body)["error"]


def test_what_the_model_refuses_is_the_error_of_the_call(app):
    job = json.loads(call(app, "POST", "/api/jobs", {"condition": "eleven", "n": 1})[2])["id"]
    report = finished(app, job)
    assert report["state"] == "failed" and "eleven" in report["error"]


def test_large_and_broken_requests_are_refused(app):
    assert call(app, "POST", "/api/jobs", raw=b"{" * 100_000)[0] == 400
    assert call(app, "POST", "/api/jobs", raw=b" " * (MOST_BYTES + 1))[0] == 400


def test_strangers_are_refused(app, pipe):
    """A page of another site reaches this server by a name of its own, or by a form."""
    assert call(app, "GET", "/api/model", host="evil.example")[0] == 400
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert call(app, "POST", "/api/jobs", {"n": 1}, **form)[0] == 400
    closed = make_app(lambda sampler: pipe, "secret", ["*"], "digits")
    assert call(closed, "GET", "/api/model")[0] == 401
    assert call(closed, "GET", "/api/model", authorization="Bearer wrong")[0] == 401
    assert call(closed, "GET", "/api/model", authorization="Bearer secret")[0] == 200
    assert call(closed, "GET", "/")[0] == 200


def test_a_port_that_is_taken_is_told():
    with listen(HOST, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port={port} cannot be listened at: Address alre"):
            listen(HOST, port)
    with pytest.raises(ValueError, match="--port=70000 cannot be listened at"):
        listen(HOST, 70000)
