"""A sampler that asks before each step, and what is left of it after a no."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion import samplers
from diffusion_jax.diffusion.samplers.watching import ask, watch


def run(watched):
    sigmas = np.linspace(8.0, 0.0, 6)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jnp.ones((2, 3))
    predict = lambda x, sigma: x / (1.0 + sigma[:, None] ** 2)  # noqa: E731
    return samplers.sample(samplers.euler(sigmas), predict, x, keys, watched=watched).x


def test_steps_after_the_first_no_are_left_out():
    whole, seen = run(False), []
    with watch(lambda step, _: seen.append(step) or True):
        np.testing.assert_array_equal(jax.jit(run, static_argnums=0)(True), whole)
    assert seen == [0, 1, 2, 3, 4]
    with watch(lambda step, _: step != 2):
        some = run(True)
    # Two steps of Euler by hand: x + (sigma' - sigma) (x - D) / sigma.
    x = np.ones((2, 3))
    for sigma, following in ((8.0, 6.4), (6.4, 4.8)):
        x = x + (following - sigma) * (x - x / (1 + sigma**2)) / sigma
    np.testing.assert_allclose(some, x, rtol=1e-5)


def test_without_a_watcher_every_step_is_taken():
    assert ask(3, 5)
    np.testing.assert_array_equal(run(True), run(False))
