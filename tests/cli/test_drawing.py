"""What was drawn is written, and values that are not finite are told and end with code 1."""

import argparse
import warnings

import numpy as np
import pytest
from support.experiments import built, trained

from diffusion_jax.cli.drawing import draw
from diffusion_jax.pipeline import NonFiniteWarning, Pipeline

FLAGS = argparse.Namespace(
    steps=3, guidance_scale=None, seed=7, batch_size=None, height=None, width=None,
    num_frames=None, fps=None, motion_bucket_id=None, cond_aug=None,
)  # fmt: skip


@pytest.mark.parametrize("bad", [0, 2])
def test_the_exit_code_and_stderr_tell_of_values_that_are_not_finite(monkeypatch, capsys, bad):
    calls = []

    def call(self, conditions, **options):
        calls.append((conditions, options))
        if bad:
            warnings.warn(f"{bad} images hold NaN", NonFiniteWarning, stacklevel=2)
        return np.zeros((4, 2, 2, 1), np.uint8)

    monkeypatch.setattr(Pipeline, "__call__", call)
    config = "configs/mnist.py:tiny"
    weights = trained(config)
    pipe = Pipeline(built(config), weights.params, weights.frozen)
    code = draw(pipe, [1], FLAGS, lambda drawn: f"wrote {len(drawn)}", n=4)
    ((conditions, options),) = calls
    assert conditions == [1] and (options["num_steps"], options["seed"], options["n"]) == (3, 7, 4)
    said = capsys.readouterr()
    assert said.out == "wrote 4\n"
    assert said.err == (f"warning: {bad} images hold NaN\n" if bad else "")
    assert code == (1 if bad else 0)
