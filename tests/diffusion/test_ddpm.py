"""q, p and the conversions between what networks predict, against Gaussians worked out by hand."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule

T = 100
SCHEDULE = make_schedule("linear", T)
BETAS = make_beta_schedule("linear", T)
ABAR = np.cumprod(1 - BETAS)


def draws(*shape, count=2, seed=0):
    values = np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)
    return [jnp.asarray(value) for value in values]


@settings(deadline=None, max_examples=40)
@given(
    t=st.integers(0, T - 1),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(["linear", "cosine", "sqrt_linear"]),
)
def test_conversions_round_trip(t, seed, name):
    """x_0, eps and v from each other at x_t: each way gives back what x_t was made from."""
    schedule = make_schedule(name, T)
    x_start, noise = draws(2, 3, seed=seed)
    t = jnp.full((2,), t, jnp.int32)
    x_t = ddpm.q_sample(schedule, x_start, t, noise)
    v = ddpm.get_v(schedule, x_start, noise, t)
    # float32 loses the digits of what x_t hardly contains: 1 / signal of x_0, 1 / sigma of eps.
    signal = float(schedule.sqrt_alphas_cumprod[t[0]])
    sigma = float(schedule.sqrt_one_minus_alphas_cumprod[t[0]])
    to_start, to_noise, close = 1e-6 / signal, 1e-6 / sigma, 1e-5
    start_from_noise = ddpm.predict_start_from_noise(schedule, x_t, t, noise)
    noise_from_start = ddpm.predict_noise_from_start(schedule, x_t, t, x_start)
    np.testing.assert_allclose(start_from_noise, x_start, atol=close + to_start)
    np.testing.assert_allclose(noise_from_start, noise, atol=close + to_noise)
    np.testing.assert_allclose(ddpm.predict_start_from_v(schedule, x_t, t, v), x_start, atol=close)
    np.testing.assert_allclose(ddpm.predict_noise_from_v(schedule, x_t, t, v), noise, atol=close)
    v_from_start = ddpm.predict_v_from_start(schedule, x_t, t, x_start)
    v_from_noise = ddpm.predict_v_from_noise(schedule, x_t, t, noise)
    np.testing.assert_allclose(v_from_start, v, atol=close + to_noise)
    np.testing.assert_allclose(v_from_noise, v, atol=close + to_start)
