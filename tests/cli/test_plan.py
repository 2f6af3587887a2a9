"""`plan` on the command line: one sentence and exit code 2 for what cannot be planned."""

import json

import pytest

from diffusion_jax.cli import main

MNIST = "--config=configs/mnist.py:tiny"
SMALL = ["--config.model.model_channels=8"]


def test_prints_a_plan_and_writes_it(tmp_path, capsys):
    path = tmp_path / "new" / "plan.json"
    command = ["plan", MNIST, "--topology=cpu:2", "--per_device_batch=1", f"--json={path}"]
    assert main([*command, *SMALL]) == 0
    assert "cpu:2: 2 devices (data 2), batch 2, 1 per device" in capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert figures["batch_size"] == 2 and figures["bytes"]["parameters"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MNIST], "give --config=CONFIG and --topology=v5p:2x2x1"),
        ([MNIST, "--topology=v9:2x2"], "topology 'v9:2x2' is unknown"),
        ([MNIST, "--topology=cpu:2", "--per_device_batch=0"], "should be at least 1"),
        (
            [MNIST, "--topology=cpu:2", "--search"],
            "'cpu:2' should be a TPU or GPU, with memory to fill",
        ),
        ([MNIST, "--topology=cpu:3"], "config.train.batch_size = 8 should be a multiple of 3"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_what_does_not_fit_says_what_would(monkeypatch, capsys):
    from diffusion_jax.plan import planning

    find = planning.find_topology
    monkeypatch.setattr(planning, "find_topology", lambda name: find(name)._replace(memory=1000))
    assert main(["plan", MNIST, "--topology=h100:2"]) == 2
    error = capsys.readouterr().err
    assert "GiB per device and h100:2 has 0.00 GiB; try a smaller --per_device_batch" in error
    assert "h100:4" in error
