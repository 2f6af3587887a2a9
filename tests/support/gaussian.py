"""Gaussian data under noise, where the denoiser, the ODE and the moments are known."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.samplers import driver

MEAN, STD = 0.4, 0.6
LOW, HIGH = 0.05, 20.0


def grid(num_steps, low=LOW, high=HIGH, rho=7.0):
    ramp = np.linspace(0.0, 1.0, num_steps)
    ends = high ** (1 / rho), low ** (1 / rho)
    return np.append((ends[0] + ramp * (ends[1] - ends[0])) ** rho, 0.0)


def exact(x, sigma):
    """The denoiser of N(MEAN, STD^2)."""
    share = STD**2 / (STD**2 + sigma**2)
    return MEAN + share.reshape(-1, *(1,) * (x.ndim - 1)) * (x - MEAN)


def bent(x, sigma):
    """No Gaussian's denoiser, so that every evaluation counts."""
    return jnp.tanh(x) / (1.0 + sigma.reshape(-1, *(1,) * (x.ndim - 1)))


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def run(sampler, predict, x, keys):
    return jax.jit(lambda x, keys: driver.sample(sampler, predict, x, keys))(x, keys)
