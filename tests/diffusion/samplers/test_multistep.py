"""Samplers with a memory: their weights are integrals of polynomials, and their first steps."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.gaussian import bent, grid, keys_of, run

from diffusion_jax.diffusion import samplers as ss
from diffusion_jax.diffusion.samplers import driver
from diffusion_jax.diffusion.samplers.multistep import exponential_weights


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_weights_integrate_polynomials(order):
    """Exactly, up to the degree order - 1, on every interval of an uneven grid."""
    sigmas = grid(9, low=0.002, high=80.0)
    weights = np.asarray(ss.lms(sigmas, order=order).coefficients.weights, np.float64)
    for i in range(len(sigmas) - 1):
        for known in range(min(i + 1, order)):
            for degree in range(known + 1):
                slopes = sigmas[i - known : i + 1][::-1] ** degree
                ends = sigmas[[i + 1, i]] ** (degree + 1) / (degree + 1)
                got = weights[i, known, : known + 1] @ slopes
                scale = np.abs(weights[i, known, : known + 1]) @ slopes
                np.testing.assert_allclose(got, ends[0] - ends[1], atol=1e-6 * scale)
    assert not weights[:, -1, order:].any()


def test_dpmpp_2m_restarts_with_a_first_order_step():
    """A segment takes the very steps of the formula on its own levels."""
    sigmas = grid(6)
    part = driver.segment(ss.dpmpp_2m(sigmas), 2, 5)
    x = x_ours = np.array([[0.3, -2.0]])
    before, h_before = None, None
    for i in range(2, 5):
        now, after = sigmas[i], sigmas[i + 1]
        denoised = np.tanh(x) / (1 + now)
        h = np.log(now / after)
        use = denoised
        if before is not None:
            use = denoised + h / (2 * h_before) * (denoised - before)
        x = after / now * x - np.expm1(-h) * use
        before, h_before = denoised, h
    got = run(part, bent, jnp.asarray(x_ours, jnp.float32), keys_of(1)).x
    np.testing.assert_allclose(got, x, rtol=1e-5)


def test_sde_without_noise_is_dpmpp_2m():
    sigmas, x = grid(8), jnp.linspace(-9.0, 9.0, 5)
    want = run(ss.dpmpp_2m(sigmas), bent, x, keys_of(5)).x
    got = run(ss.dpmpp_2m_sde(sigmas, eta=0.0), bent, x, keys_of(5)).x
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("places", [[0.0], [0.0, -0.7], [0.0, -0.7, -2.1], [1.0, 0.0, -0.7]])
@pytest.mark.parametrize("c", [0.01, 1.3, 12.0, -1.3])
def test_exponential_weights_integrate_polynomials(places, c):
    """Against a sum over a million intervals."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    weights = exponential_weights(np.array(places), c)
    for degree in range(len(places)):
        want = np.mean(c * np.exp(-c * (1 - u)) * u**degree)
        np.testing.assert_allclose(weights @ np.array(places) ** degree, want, rtol=1e-6, atol=1e-9)


def test_deis_of_order_two_by_its_integral():
    """In float64: slopes on a line in log(sigma), integrated over sigma; the last step is to D."""
    sigmas, x, before = grid(5), np.array([[0.3, -2.0]]), None
    start = jnp.asarray(x, jnp.float32)
    for i in range(5):
        now, after = sigmas[i], sigmas[i + 1]
        slope = (x - np.tanh(x) / (1 + now)) / now
        move = (after - now) * slope
        if before is not None and after > 0:
            # int (log s - log now) ds from now to after
            area = after * np.log(after / now) - (after - now)
            move += area * (slope - before) / np.log(now / sigmas[i - 1])
        x, before = x + move, slope
    got = run(ss.deis(sigmas, order=2), bent, start, keys_of(1)).x
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


def test_deis_of_order_one_is_euler():
    sigmas, x = grid(8), jnp.linspace(-9.0, 9.0, 5)
    want = run(ss.euler(sigmas), bent, x, keys_of(5)).x
    np.testing.assert_allclose(
        run(ss.deis(sigmas, order=1), bent, x, keys_of(5)).x, want, atol=1e-5
    )


def test_unipc_corrects_with_what_the_next_step_sees():
    """Three steps of order 1 by hand: the denoised images at both ends of a step, one half each."""
    sigmas, x = grid(3), np.array([[0.3, -2.0]])
    start, image = jnp.asarray(x, jnp.float32), lambda x, sigma: np.tanh(x) / (1 + sigma)
    seen = image(x, sigmas[0])
    for now, after in zip(sigmas[:2], sigmas[1:3], strict=True):
        share = 1 - after / now
        guess = (1 - share) * x + share * seen
        ahead = image(guess, after)
        x, seen = (1 - share) * x + share * 0.5 * (seen + ahead), ahead
    got = run(ss.unipc(sigmas, order=1), bent, start, keys_of(1)).x
    np.testing.assert_allclose(got, seen, rtol=1e-5)  # the last step ends at D
    part = driver.segment(ss.unipc(sigmas, order=1), 0, 2)
    got = run(part, bent, start, keys_of(1)).x  # x before its correction
    np.testing.assert_allclose(got, guess, rtol=1e-5)
