"""Losses by noise level in closed form: a network that predicts nothing has the noise as error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.data.batches import Batches
from diffusion_jax.experiment.network.frames import FRAME, NOISED_FRAME
from diffusion_jax.experiment.scoring import Levels
from diffusion_jax.randomness import Stream, fold_in_all, noise_like, sample_keys, stream_key
from diffusion_jax.runs.measuring import levels
from diffusion_jax.runs.measuring.levels import (
    build_evaluate_levels,
    build_level_losses,
    level_lines,
    noise_levels,
)
from diffusion_jax.train.ema import ema
from diffusion_jax.train.state import TrainState

TINY = "configs/mnist.py:tiny"


def split(ids):
    """Batches of two images; id -1 is padding."""
    batches = [
        {
            "image": np.full((2, 28, 28, 1), 0.25, np.float32),
            "label": np.zeros(2, np.int32),
            "index": np.array(pair, np.int64),
            "weight": (np.array(pair) >= 0).astype(np.float32),
        }
        for pair in ids
    ]
    return Batches(lambda start: iter(batches[start:]), 4, len(batches), ((28, 28),))


@pytest.fixture
def silent(monkeypatch):
    """A network that predicts params["w"] everywhere, and no conditions."""
    experiment = built(TINY)
    network = type(experiment.network)
    monkeypatch.setattr(
        network, "apply", lambda self, p, x, t, c: jnp.full(x.shape, p["w"], jnp.float32)
    )
    monkeypatch.setattr(network, "embed", lambda *given: {})
    return experiment


def test_the_loss_is_the_mean_square_of_what_the_network_should_say(silent):
    """The tiny config predicts v = (noise - sigma x) / sqrt(1 + sigma^2); 0 misses all of it."""
    batches = split([(7, 3), (5, -1)])
    options = Levels(num_levels=3, num_images=9)
    frozen = silent.frozen_constants()
    sigmas, losses = build_level_losses(silent, frozen, batches, options)
    found = losses({"w": jnp.float32(0.0)})
    keys = sample_keys(stream_key(silent.seed, Stream.LEVELS), jnp.array([7, 3, 5]))
    noises = [noise_like(fold_in_all(keys, level), (28, 28, 1)) for level in range(3)]
    expected = [
        jnp.mean((noise - sigma * 0.25) ** 2, (1, 2, 3)) / (1 + sigma**2)
        for noise, sigma in zip(noises, sigmas, strict=True)
    ]
    assert found.shape == (3, 3) and len(sigmas) == 3
    # at the lowest level float32 keeps few digits of sigma * noise beside the image
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=2e-3)
    np.testing.assert_array_equal(found, losses({"w": jnp.float32(0.0)}))
    other = build_level_losses(silent, frozen, split([(3, 5), (7, -1)]), options)[1]
    np.testing.assert_array_equal(found[[1, 2, 0]], other({"w": jnp.float32(0.0)}))
    few = build_level_losses(silent, frozen, batches, options._replace(num_images=2))[1]
    np.testing.assert_array_equal(found[:2], few({"w": jnp.float32(0.0)}))


def test_levels_span_the_table():
    noise = built(TINY).drawing.noise
    found = noise_levels(noise, 5)
    assert np.all(np.diff(found) > 0)
    np.testing.assert_allclose(found[[0, -1]], np.asarray(noise.sigmas)[[0, -1]])
    grid = noise._replace(sigmas=None, grid=lambda n: np.array([80.0, 2.0, 0.5, 0.0]))
    np.testing.assert_array_equal(noise_levels(grid, 3), [0.5, 2.0, 80.0])


def test_changes_are_paired_with_the_call_before(silent):
    evaluate = build_evaluate_levels(
        silent, silent.frozen_constants(), split([(0, 1), (2, 3)]), Levels(2, 4)
    )
    states = [TrainState(jnp.int32(n), {"w": jnp.float32(n)}, (), {}) for n in (0, 1)]
    first, second = map(evaluate, states)
    assert set(first) == {f"levels/0{i}{n}" for i in (0, 1) for n in ("_sigma", "", "_ci")}
    for i in range(2):
        change = second[f"levels/0{i}"] - first[f"levels/0{i}"]
        assert second[f"levels/0{i}_change"] == pytest.approx(change, rel=1e-4)
        # |noise - 1|^2 - |noise|^2 is 1 - 2 mean(noise): its spread is 2 / 28
        assert second[f"levels/0{i}_change_ci"] < 0.3
    line = level_lines(second)[1].split()
    assert line[0] == "sigma" and "change" in line and len(level_lines(first)) == 2


def test_bits_per_dimension_come_raw_and_averaged_and_paired_over_steps(silent, monkeypatch):
    """Images whose bounds are 3, 5 plus what the weights are: means, spreads and changes follow."""
    monkeypatch.setattr(
        levels, "build_bits", lambda *g: lambda params: np.array([3.0, 5.0]) + float(params["w"])
    )
    experiment = silent._replace(
        task=silent.task._replace(averaged=lambda state: {"w": 2 * state.params["w"]})
    )
    options, tx = Levels(num_levels=1, num_images=2, bits_images=2), ema(0.5)
    evaluate = build_evaluate_levels(
        experiment, silent.frozen_constants(), split([(0, 1)]), options
    )
    trees = [{"w": jnp.float32(n)} for n in (0, 1)]
    states = [TrainState(jnp.int32(0), tree, tx.init(tree), {}) for tree in trees]
    first, second = map(evaluate, states)
    assert (first[levels.BITS], first[f"{levels.BITS}_ema"]) == (4.0, 4.0)
    assert first[f"{levels.BITS}_ci"] == pytest.approx(1.96, abs=1e-2)
    assert (second[levels.BITS], second[f"{levels.BITS}_ema"]) == (5.0, 6.0)
    assert second[f"{levels.BITS}_change"] == 1.0 and second[f"{levels.BITS}_change_ema"] == 2.0
    assert second[f"{levels.BITS}_change_ci"] == 0.0  # paired: the images' spread cancels
    told = " ".join(level_lines(second)[-1].split())
    assert told.startswith("bits per dimension 5 ± 2 change +1 ± 0 bits per dimension ema 6 ± 2")


@pytest.mark.parametrize(
    ("path", "count", "message"),
    [
        (TINY, 1, "bits_images = 1 should be 0, or at"),
        ("configs/emoji_ldm.py:tiny", 4, "bits_images = 4 should be 0: bits"),
    ],
)
def test_bits_of_one_image_or_of_latents_are_refused(path, count, message):
    experiment = built(path)
    with pytest.raises(ValueError, match=message):
        build_evaluate_levels(experiment, {}, split([(0, 1)]), Levels(bits_images=count))


@pytest.mark.parametrize("options", [Levels(num_levels=0), Levels(num_images=1)])
def test_impossible_numbers_are_said(options):
    with pytest.raises(ValueError, match="num_(levels = 0|images = 1) should be at least"):
        build_level_losses(built(TINY), {}, split([(0, 1)]), options)


def test_a_real_network_runs_at_every_level():
    experiment = built(TINY)
    state = experiment.abstract_state()
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.params)
    batches = split([(0, 1)])
    _, losses = build_level_losses(experiment, experiment.random_frozen(), batches, Levels(2, 2))
    assert np.isfinite(losses(params)).all()


def test_clips_come_with_their_conditioning_frame(monkeypatch):
    experiment = built("configs/moving_digits.py:tiny")
    network, seen = experiment.network, []
    frame_of = lambda batch: {"concat": batch[NOISED_FRAME]}
    monkeypatch.setattr(type(network), "apply", lambda self, p, x, t, c: jnp.zeros(x.shape))
    monkeypatch.setattr(
        type(network),
        "embed",
        lambda self, p, f, batch: seen.append(sorted(batch)) or frame_of(batch),
    )
    clips = np.zeros((2, *network.sample_shape), np.float32)
    example = jax.tree.map(np.asarray, network.example_inputs(2))
    batch = example | {"image": clips, "index": np.arange(2), "weight": np.ones(2, np.float32)}
    batches = Batches(lambda start: iter([batch]), 2, 1, (clips.shape[2:4],))
    _, losses = build_level_losses(experiment, experiment.frozen_constants(), batches, Levels(2, 2))
    assert np.isfinite(losses({})).all()
    assert {FRAME, NOISED_FRAME} <= {*seen[0]}
