"""The losses of a discriminator against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.first_stage.gan_loss import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    leaf_at,
    mean_logit,
)

STREAM = np.random.default_rng(0)
REAL, FAKE = STREAM.normal(size=(2, 3, 4, 4, 1)) * 2
WEIGHT = np.array([1.0, 3.0, 0.0])


def by_sample(values, weight):
    return np.average(values.reshape(3, -1).mean(1), weights=weight)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize(
    ("name", "f"),
    [("hinge", lambda x: np.maximum(0, 1 + x)), ("vanilla", lambda x: np.log1p(np.exp(x)))],
)
def test_the_discriminator_parts_real_from_fake(name, f, weight):
    given = None if weight is None else jnp.float32(weight)
    found = discriminator_loss(jnp.float32(REAL), jnp.float32(FAKE), given, disc_loss=name)
    expected = (by_sample(f(-REAL), weight) + by_sample(f(FAKE), weight)) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_generator_wants_the_opposite():
    found = generator_loss(jnp.float32(FAKE), jnp.float32(WEIGHT))
    np.testing.assert_allclose(found, -by_sample(FAKE, WEIGHT), rtol=1e-5)
    half = jnp.asarray(FAKE, jnp.bfloat16)
    assert mean_logit(half).dtype == jnp.float32


def test_a_loss_of_another_name_is_refused():
    with pytest.raises(ValueError, match="disc_loss = 'hing' .*hinge"):
        discriminator_loss(jnp.ones((1, 2)), jnp.ones((1, 2)), disc_loss="hing")


def test_gradients_are_balanced_up_to_a_limit():
    nll, g = jnp.array([3.0, 4.0]), jnp.array([[0.6], [0.8]])
    np.testing.assert_allclose(adaptive_weight(nll, g), 5 / (1 + 1e-4), rtol=1e-6)
    assert float(adaptive_weight(nll, jnp.zeros(2))) == 1e4  # 5e4 without the limit
    slope = jax.grad(lambda x: adaptive_weight(x, g).sum())(nll)
    assert not slope.any()


def test_the_last_layer_is_found_by_its_path():
    tree = {"decoder": {"conv_out": {"kernel": jnp.arange(3)}}}
    assert leaf_at(tree, ("decoder", "conv_out", "kernel")).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"after decoder comes conv_out$"):
        leaf_at(tree, ("decoder", "conv_in", "kernel"))
    with pytest.raises(ValueError, match="after the root comes decoder"):
        leaf_at(tree, ("encoder",))
    with pytest.raises(ValueError, match="after decoder/conv_out/kernel comes an array"):
        leaf_at(tree, ("decoder", "conv_out", "kernel", "x"))
