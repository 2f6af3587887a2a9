"""What the image hook shows: the q(x_t) row is the forward process, with noise of its own."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.experiments import built

from diffusion_jax.diffusion.samplers.driver import Samples, initial_noise
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.experiment.pictures import draw_pictures
from diffusion_jax.randomness import fold_in_all, noise_like

COUNT, STEPS = 3, 4


@pytest.fixture(scope="module")
def shown():
    """Pictures of grey images at timesteps 0, 400, 800 and 999, and what the sampler was given."""
    experiment, asked = built("configs/mnist.py:tiny"), types.SimpleNamespace()

    def sample_fn(params, frozen, inputs, keys, *, log_every, size):
        asked.__dict__.update(params=params, inputs=inputs, keys=keys, size=size)
        x = jnp.zeros((COUNT, 28, 28, 1))
        return Samples(x, None, jnp.stack([x, x + 1]))

    drawing = experiment.drawing._replace(sample_fn=sample_fn)
    state = experiment.init_state()
    frozen = experiment.random_frozen()
    log_images = draw_pictures(
        drawing, experiment.setting, frozen, max_images=COUNT, log_every_t=400
    )
    batch = {
        "image": np.full((5, 28, 28, 1), 0.5, np.float32),
        "label": np.arange(5, dtype=np.int32),
    }
    return log_images(state, batch), asked, lambda: log_images(state, batch)


def noise_of(shown):
    """The noise in the row, solved for: (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
    schedule, steps = make_schedule("squaredcos_cap_v2"), np.array([0, 400, 800, 999])
    kept, added = (
        np.asarray(table[steps], np.float64)[:, None, None, None]
        for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    return (np.asarray(shown["diffusion_row"]) - kept * 0.5) / added


def test_the_row_is_the_forward_process_with_one_noise_an_image(shown):
    noise = noise_of(shown[0])
    assert noise.shape == (COUNT, 4, 28, 28, 1)
    np.testing.assert_allclose(noise, np.broadcast_to(noise[:, -1:], noise.shape), atol=1e-4)
    last = noise[:, -1].reshape(COUNT, -1)
    assert np.abs(last.mean(1)).max() < 0.2 and np.abs(last.std(1) - 1).max() < 0.1
    assert np.abs(np.corrcoef(last) - np.eye(COUNT)).max() < 0.2


def test_samples_and_the_row_share_no_noise(shown):
    """Neither the noise that sampling starts from nor that of any of its steps."""
    log, asked, _ = shown
    drawn = [noise_like(asked.keys, (28, 28, 1)), initial_noise(asked.keys, (28, 28, 1))]
    drawn += [noise_like(fold_in_all(asked.keys, i), (28, 28, 1)) for i in range(STEPS)]
    ours = noise_of(log)[:, -1].reshape(COUNT, -1)
    for theirs in drawn:
        theirs = np.asarray(theirs).reshape(COUNT, -1)
        assert np.abs(np.corrcoef(ours, theirs)[:COUNT, COUNT:]).max() < 0.2


def test_the_same_pictures_at_every_step_and_no_more_than_asked_for(shown):
    log, asked, again = shown
    jax.tree.map(np.testing.assert_array_equal, again(), log)
    assert asked.inputs["label"].tolist() == [0, 1, 2] and asked.size == (28, 28)
    assert log["conditioning"] == ["0", "1", "2"] and len(log["inputs"]) == COUNT
    assert log["denoise_row"].shape == (COUNT, 2, 28, 28, 1)
