"""Losses over a split by closed forms, and which models have bits per dimension."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.data.batches import Batches
from diffusion_jax.randomness import Stream, sample_keys, stream_key
from diffusion_jax.runs import evaluation
from diffusion_jax.runs.evaluation import build_evaluate, has_likelihood, mean_bits
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


@pytest.mark.parametrize(
    ("name", "answer"),
    [("mnist", True), ("cifar10", True), ("emoji_ldm", False), ("sdxl", False), ("vq_f4", False)],
)
def test_pixel_models_on_timesteps_have_bits_per_dimension(name, answer):
    assert has_likelihood(built(f"configs/{name}.py:tiny")) is answer


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 1, 3]), (9, [0, 1, 3, 4])])
def test_bits_are_those_of_the_first_images_each_with_a_key_of_its_own(
    monkeypatch, count, expected
):
    """Padding does not count, wherever it is; the conditions come along with their images."""
    seen = []

    def bits_per_dim(schedule, denoise, image, keys, *, parameterization):
        data = jax.random.key_data(keys)[:, -1]
        seen.append((np.asarray(image[:, 0, 0, 0]), np.asarray(data)))
        return SimpleNamespace(total=image[:, 0, 0, 0] * 10.0)

    monkeypatch.setattr(evaluation, "bits_per_dim", bits_per_dim)
    monkeypatch.setattr(jax, "jit", lambda function, **_: function)
    experiment = built("configs/mnist.py:tiny")

    def batch(first, weights):
        rows = np.arange(first, first + len(weights), dtype=np.float32)
        return {
            "image": rows[:, None, None, None] * np.ones((1, 28, 28, 1), np.float32),
            "label": np.zeros(len(rows), np.int32),
            "weight": np.asarray(weights, np.float32),
        }

    batches = split(batch(0, [1, 1, 0, 1]), batch(4, [1, 0, 0, 0]))
    params, frozen = experiment.abstract_state().params, experiment.frozen_constants()
    monkeypatch.setattr(type(experiment.network), "embed", lambda *_: None)
    bits = mean_bits(experiment, params, frozen, batches, count)
    assert bits == pytest.approx(10.0 * np.mean(expected))
    images, keys = (np.concatenate(part) for part in zip(*seen, strict=True))
    assert images.tolist() == expected
    own = sample_keys(stream_key(experiment.seed, Stream.LIKELIHOOD), jnp.arange(len(expected)))
    assert keys.tolist() == jax.random.key_data(own)[:, -1].tolist()
