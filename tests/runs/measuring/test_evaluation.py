"""Losses over a split by closed forms."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from support.experiments import built

from diffusion_jax.data.batches import Batches
from diffusion_jax.runs.measuring.evaluation import build_evaluate
from diffusion_jax.train.ema import ema
from diffusion_jax.train.state import TrainState


def split(*batches):
    """Batches of given rows, as eval_batches makes them: the last one is padded."""
    return Batches(lambda start: iter(batches[start:]), 5, len(batches), ((1, 1),))


def evaluated(num_batches=None, averages=True):
    """Evaluate a loss that is params * mean(image) + frozen + number of the batch."""

    def eval_step(params, mutable, frozen, batch, number):
        weight = batch["weight"].sum()
        mean = (batch["image"] * batch["weight"]).sum() / weight
        return {"loss": params["w"] * mean + frozen + number + mutable["m"], "weight": weight}

    tx = ema(0.5) if averages else SimpleNamespace(init=lambda params: ())
    opt_state = tx.init({"w": jnp.float32(10.0)})
    state = TrainState(jnp.int32(0), {"w": jnp.float32(2.0)}, opt_state, {"m": jnp.float32(0.25)})
    experiment = built("configs/mnist.py:tiny")
    task = experiment.task._replace(
        eval_step=eval_step,
        averaged=lambda state: {"w": jnp.float32(10.0)},
        with_inputs=lambda batch: batch,
        embedders={},
    )
    experiment = experiment._replace(task=task)
    rows = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([7.0, 9.0, 9.0, 9.0])
    weights = jnp.ones(4), jnp.array([1.0, 0.0, 0.0, 0.0])
    batches = split(*({"image": r, "weight": w} for r, w in zip(rows, weights, strict=True)))
    options = dict(prefix="val", num_batches=num_batches)
    return build_evaluate(experiment, jnp.float32(100.0), batches, **options)(state)


def test_losses_are_means_over_the_records_with_raw_and_with_averaged_weights():
    # Four records of mean 2.5 in batch 0 and one record of 7 in batch 1.
    raw = (4 * (2 * 2.5 + 100.25) + (2 * 7 + 101.25)) / 5
    averaged = (4 * (10 * 2.5 + 100.25) + (10 * 7 + 101.25)) / 5
    assert evaluated() == pytest.approx({"val/loss": raw, "val/loss_ema": averaged})


def test_fewer_batches_on_request_and_no_averages_where_none_are_kept():
    assert evaluated(num_batches=1, averages=False) == pytest.approx({"val/loss": 105.25})
