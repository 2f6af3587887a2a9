"""Mean velocities of Gaussian data, whose paths are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import mean_flow

MEAN, STD = 0.4, 0.6


def spread(t):
    return jnp.sqrt((1 - t) ** 2 * STD**2 + t**2)


def velocity(z, t):
    """E[eps - x_0 | z_t = z]."""
    t = t[:, None]
    centred = (z - (1 - t) * MEAN) / spread(t) ** 2
    return t * centred - (MEAN + (1 - t) * STD**2 * centred)


def mean_velocity(z, t, r):
    """(z_t - z_r) / (t - r): z is always as many deviations from the mean of its time."""
    t, r = t[:, None], r[:, None]
    end = (1 - r) * MEAN + spread(r) / spread(t) * (z - (1 - t) * MEAN)
    return (z - end) / (t - r)


@pytest.fixture
def places():
    t, r = jax.random.uniform(jax.random.key(0), (2, 64), minval=0.05, maxval=0.95)
    t, r = jnp.maximum(t, r) + 0.02, jnp.minimum(t, r)
    return jax.random.normal(jax.random.key(1), (64, 3)), t, r


def test_the_true_mean_velocity_is_its_own_target(places):
    z, t, r = places
    found = mean_flow.velocity_and_target(mean_velocity, z, t, r, velocity(z, t))
    np.testing.assert_allclose(*found, rtol=2e-3, atol=2e-4)
    off = lambda z, t, r: mean_velocity(z, t, r) + 0.1 * (t - r)[:, None]
    u, target = mean_flow.velocity_and_target(off, z, t, r, velocity(z, t))
    assert float(jnp.abs(u - target).max()) > 0.05


def test_nothing_is_learned_through_the_target(places):
    z, t, r = places

    def gradient(part):
        scaled = lambda a: mean_flow.velocity_and_target(
            lambda *place: a * mean_velocity(*place), z, t, r, velocity(z, t)
        )
        return float(jax.grad(lambda a: jnp.sum(scaled(a)[part] ** 2))(1.0))

    assert gradient(0) > 1.0 and gradient(1) == 0.0


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_a_guided_network_is_where_guidance_leads(kappa):
    own, null = jnp.asarray([[2.0], [2.0]]), jnp.asarray([[0.5], [0.5]])
    guided = null + 3.0 * (own - null)
    found = mean_flow.guided_velocity(
        own, guided, null, jnp.asarray([False, True]), guidance_scale=3.0, kappa=kappa
    )
    np.testing.assert_allclose(found, [guided[0], own[1]], rtol=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_adaptive_loss_and_its_gradient(power):
    prediction = jnp.asarray([[3.0, 4.0], [0.6, 0.8], [9.0, 9.0]])
    target, weight = jnp.zeros((3, 2)), jnp.asarray([1.0, 1.0, 0.0])
    loss = lambda prediction: mean_flow.adaptive_loss(prediction, target, power, weight)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(prediction)
    factor = np.array([25.001, 1.001]) ** -power
    np.testing.assert_allclose(value, np.mean(factor * [25.0, 1.0]), rtol=1e-5)
    wanted = np.array([[3.0, 4.0], [0.6, 0.8]]) * factor[:, None]  # 2 difference / 2 samples
    np.testing.assert_allclose(gradient[:2], wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_velocity"], 6.5, rtol=1e-6)
