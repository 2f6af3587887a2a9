"""Samplers on Gaussian data, where the answers are known, and the timesteps that they visit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.diffusion import ddpm, samplers
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule

MEAN, STD = 0.4, 0.6
NAMES = ("uniform", "quad", "leading", "trailing", "linspace")


def exact(schedule, parameterization="eps"):
    """A perfect network for x_0 ~ N(MEAN, STD^2)."""

    def predict(x_t, t):
        signal = ddpm.at(schedule.sqrt_alphas_cumprod, t, x_t)
        sigma = ddpm.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
        centred = (x_t - signal * MEAN) / (signal**2 * STD**2 + sigma**2)
        x_start, noise = MEAN + signal * STD**2 * centred, sigma * centred
        v = signal * noise - sigma * x_start
        return {"eps": noise, "x0": x_start, "v": v}[parameterization]

    return predict


def marginal(abar):
    return np.sqrt(abar) * MEAN, np.sqrt(abar * STD**2 + 1 - abar)


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_uniform_is_upstreams_where_steps_divide():
    visited, previous = samplers.visited_timesteps(1000, 50, "uniform")
    np.testing.assert_array_equal(visited, np.arange(50) * 20 + 1)
    np.testing.assert_array_equal(previous, [0, *visited[:-1]])


def test_quad_is_upstreams_where_it_does_not_repeat():
    visited, previous = samplers.visited_timesteps(1000, 50, "quad")
    assert visited[:6].tolist() == [1, 2, 3, 4, 6, 9]  # upstream: 1, 1, 2, 3, 6, 9
    assert visited[-2:].tolist() == [768, 801]
    assert previous[0] == 0


def test_diffusers_spacings():
    visited = {name: samplers.visited_timesteps(1000, 10, name)[0] for name in NAMES}
    np.testing.assert_array_equal(visited["leading"], np.arange(10) * 100)
    np.testing.assert_array_equal(visited["trailing"], np.arange(10) * 100 + 99)
    np.testing.assert_array_equal(visited["linspace"], np.arange(10) * 111)
    assert samplers.visited_timesteps(1000, 1, "linspace")[0].tolist() == [999]
    assert samplers.visited_timesteps(1000, 1, "trailing")[0].tolist() == [999]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_every_spacing_takes_exactly_the_steps_asked_for(data):
    total = data.draw(st.integers(1, 1200), "T")
    steps = data.draw(st.integers(1, total), "S")
    name = data.draw(st.sampled_from(NAMES))
    visited, previous = samplers.visited_timesteps(total, steps, name)
    assert visited.shape == previous.shape == (steps,)
    assert visited.dtype == previous.dtype == np.int32
    assert visited[0] >= 0 and visited[-1] <= total - 1
    assert np.all(np.diff(visited) > 0)
    np.testing.assert_array_equal(previous[1:], visited[:-1])
    assert previous[0] == (0 if name in ("uniform", "quad") and visited[0] > 0 else -1)


@pytest.mark.parametrize("steps", [0, 11, -3])
def test_steps_outside_the_schedule_are_refused(steps):
    with pytest.raises(ValueError, match=rf"num_steps = {steps} should lie in \[1, 10\]"):
        samplers.visited_timesteps(10, steps, "uniform")


def test_unknown_spacing_lists_the_choices():
    with pytest.raises(ValueError, match="'even' is unknown; choose from " + ", ".join(NAMES)):
        samplers.visited_timesteps(10, 5, "even")


def test_eta_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"eta = 1.5 should lie in \[0, 1\]"):
        samplers.ddim(make_schedule("linear", 10), 5, eta=1.5)


def ddim_errors(steps, total=4096, **options):
    """Largest distance from the exact solution of the probability-flow ODE, for each step count."""
    scale = 1000 / total
    ramp = {"linear_start": 1e-4 * scale, "linear_end": 2e-2 * scale}
    schedule = make_schedule("linear", total, **ramp)
    abar = np.cumprod(1 - make_beta_schedule("linear", total, **ramp))
    x_T = np.linspace(-2.5, 2.5, 7)
    errors = []
    for count in steps:
        sampler = samplers.ddim(schedule, count, **options)
        visited, previous = samplers.visited_timesteps(
            total, count, options["discretize"] if "discretize" in options else "uniform"
        )
        keys = keys_of(7)
        got = samplers.sample(sampler, exact(schedule), jnp.asarray(x_T, jnp.float32), keys)
        mean, std = marginal(abar[visited[-1]])
        end_mean, end_std = marginal(1.0 if previous[0] < 0 else abar[previous[0]])
        solution = end_mean + end_std * (x_T - mean) / std
        errors.append(np.abs(np.asarray(got.x) - solution).max())
    return np.array(errors)


@pytest.mark.parametrize("discretize", ["uniform", "trailing", "linspace"])
def test_ddim_converges_to_the_ode_with_order_one(discretize):
    steps = [16, 32, 64, 128, 256]
    errors = ddim_errors(steps, discretize=discretize)
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.2 < slope < -0.8, (slope, errors)
    assert errors[-1] < 0.01
