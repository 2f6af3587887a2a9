"""Weights & Biases gets what the other writers get; a module of its name stands in for it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion_jax.train.wandb_writer import wandb_writer


@pytest.fixture
def wandb(monkeypatch):
    """What wandb was asked for, as (name, arguments) in order."""
    calls = []

    def init(**options):
        calls.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "abc",
            define_metric=lambda *a, **k: calls.append(("define_metric", (*a, k))),
            log=lambda row: calls.append(("log", row)),
            finish=lambda: calls.append(("finish", None)),
        )

    module = SimpleNamespace(init=init, Image=lambda grid: ("image", grid.shape))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_scalars_and_pictures_are_sent_with_their_steps(wandb, tmp_path):
    writer = wandb_writer(tmp_path, {"seed": 3}, project="digits", mode="offline")
    writer.write_scalars(4, {"loss": np.float32(0.5)})
    writer.write_images(4, {"samples": np.zeros((2, 3, 3, 1), np.uint8)})
    writer.write_images(4, {"clips": np.zeros((1, 2, 3, 3, 1), np.uint8)})
    writer.write_texts(4, {"x": "y"})
    writer.flush()
    writer.close()
    (_, init), (_, metric), *rest = wandb
    assert init["config"] == {"seed": 3} and init["mode"] == "offline" and init["id"] is None
    assert (init["project"], init["name"]) == ("digits", tmp_path.name)
    assert metric == ("*", {"step_metric": "step"})
    assert rest == [
        ("log", {"step": 4, "loss": 0.5}),
        ("log", {"step": 4, "samples": ("image", (7, 12, 1))}),
        ("finish", None),
    ]


def test_a_run_that_goes_on_is_the_same_run(wandb, tmp_path):
    for _ in range(2):
        wandb_writer(tmp_path, {}, project="digits", name="mine")
    inits = [options for name, options in wandb if name == "init"]
    assert [init["id"] for init in inits] == [None, "abc"] and inits[1]["resume"] == "allow"
    assert inits[0]["name"] == "mine"


def test_without_wandb_one_sentence_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="config.hooks.wandb needs wandb: pip install wandb"):
        wandb_writer(tmp_path, {}, project="digits")
    with pytest.raises(ValueError, match="mode = 'off' is unknown"):
        wandb_writer(tmp_path, {}, project="digits", mode="off")
