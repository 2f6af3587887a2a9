"""The regularizers of a config: the temperature of a Gumbel quantizer follows its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.first_stage.regularizer import build_regularizer
from diffusion_jax.models.first_stage.autoencoder import Autoencoder

MODULE = Autoencoder(embed_dim=3, z_channels=3, double_z=False)
# From 1 to 1/16 in 4 steps of half.
FALLING = dict(name="exponential_decay", transition_steps=1, decay_rate=0.5)
SOFT = dict(name="gumbel", num_codes=5, straight_through=False)


def at_step(regularizer, step, train=True):
    params, mutable = regularizer.init(jax.random.key(0))
    moments = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    keys = jax.random.split(jax.random.key(2), 2)
    step = None if step is None else jnp.int32(step)
    z, log, _ = regularizer.apply(params, mutable, moments, keys, train=train, step=step)
    return np.asarray(z), log


def test_the_temperature_is_that_of_the_step():
    falling = build_regularizer(SOFT | {"temperature": FALLING}, MODULE)
    for step, temperature in ((0, 1.0), (4, 0.0625)):
        z, log = at_step(falling, step)
        constant = dict(name="constant", value=temperature)
        expected, _ = at_step(build_regularizer(SOFT | {"temperature": constant}, MODULE), 0)
        np.testing.assert_allclose(z, expected, rtol=1e-5)
        assert float(log["scalars/temperature"]) == temperature
    warm, cold = at_step(falling, 0)[0], at_step(falling, 10)[0]
    codes = np.asarray(falling.init(jax.random.key(0))[0]["quantize"]["embedding"])
    distance = lambda z: np.abs(z[..., None, :] - codes).max(-1).min(-1)
    assert distance(cold).max() < 1e-3 < 0.1 < distance(warm).max()  # cold ones are codes


def test_without_a_schedule_it_is_one_and_evaluation_does_not_log_it():
    plain = build_regularizer(SOFT, MODULE)
    assert float(at_step(plain, 7)[1]["scalars/temperature"]) == 1.0
    assert "scalars/temperature" not in at_step(plain, None, train=False)[1]


def test_a_gaussian_draws_for_each_sample_from_its_own_key():
    regularizer = build_regularizer(dict(name="kl"), MODULE.clone(double_z=True))
    moments = jax.random.normal(jax.random.key(1), (4, 2, 2, 6))
    rows = jnp.array([3, 1])
    keys = lambda: jax.random.split(jax.random.key(2), 4)
    drawn, log, _ = regularizer.apply({}, {}, moments, keys(), train=True)
    part, part_log, _ = regularizer.apply({}, {}, moments[rows], keys()[rows], train=True)
    np.testing.assert_array_equal(part, drawn[rows])
    np.testing.assert_array_equal(part_log["kl_loss"], log["kl_loss"][rows])
    noise = (drawn - moments[..., :3]) / jnp.exp(moments[..., 3:] / 2)
    for i, key in enumerate(keys()):
        np.testing.assert_allclose(
            noise[i], jax.random.normal(key, (2, 2, 3)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            SOFT | {"temperature": dict(name="cos")},
            r"regularizer\.temperature\.name = 'cos' is unkn",
        ),
        (
            SOFT | {"temperature": dict(name="constant", v=1)},
            r"temperature\.v = 1 is not an option",
        ),
        (dict(name="vq", temperature=FALLING), r"regularizer\.temperature = .* is not an option"),
    ],
)
def test_mistakes_are_told(section, message):
    with pytest.raises(ConfigError, match=message):
        build_regularizer(section, MODULE)
