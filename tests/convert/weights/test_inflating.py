"""The convolutions around the latent of an image autoencoder become a part of their neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.trees import drawn

from diffusion_jax.convert.weights.inflating import inflated, with_quant_conv
from diffusion_jax.models.first_stage.autoencoder import Autoencoder
from diffusion_jax.models.layers.basic import conv

TINY = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, resolution=8)


@pytest.fixture(scope="module")
def image():
    """Parameters of an image autoencoder with convolutions around the latent."""
    example = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(Autoencoder(**TINY).init, jax.random.key(0), example)["params"]
    return drawn(params)


def test_the_moments_stay(image):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    folded = inflated(image, use_quant_conv=False)
    assert set(folded) == {"encoder", "decoder"}
    plain = Autoencoder(**TINY, use_quant_conv=False)
    expected = jax.jit(lambda p: Autoencoder(**TINY).apply({"params": p}, x, method="encode"))(
        image
    )
    found = jax.jit(lambda p: plain.apply({"params": p}, x, method="encode"))(folded)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    kept = inflated(image, use_quant_conv=True)
    assert set(kept) == {"encoder", "decoder", "quant_conv"}
    assert kept["encoder"] is image["encoder"]


def test_an_encoder_without_the_convolution_gets_one_that_changes_nothing(image):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    encoder = {"encoder": image["encoder"]}
    plain = Autoencoder(**TINY, use_quant_conv=False)
    expected = jax.jit(lambda p: plain.apply({"params": p}, x, method="encode"))(encoder)
    whole = with_quant_conv(encoder)
    assert set(whole) == {"encoder", "quant_conv"} and with_quant_conv(image) == image
    found = jax.jit(lambda p: Autoencoder(**TINY).apply({"params": p}, x, method="encode"))(whole)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_first_layer_of_the_decoder_stays_but_at_the_border(image):
    z = jax.random.normal(jax.random.key(2), (1, 6, 6, 4))
    first = conv(4, 16)
    after = conv(4, 4, (1, 1)).apply({"params": image["post_quant_conv"]}, z)
    expected = first.apply({"params": image["decoder"]["conv_in"]}, after)
    folded = inflated(image, use_quant_conv=False)["decoder"]["conv_in"]
    error = np.abs(first.apply({"params": folded}, z) - expected)
    assert error[:, 1:-1, 1:-1].max() < 1e-5 < error[:, 0].max()
    unbiased = {**image["post_quant_conv"], "bias": jnp.zeros(4)}
    folded = inflated({**image, "post_quant_conv": unbiased}, use_quant_conv=False)
    after = conv(4, 4, (1, 1)).apply({"params": unbiased}, z)
    expected = first.apply({"params": image["decoder"]["conv_in"]}, after)
    found = first.apply({"params": folded["decoder"]["conv_in"]}, z)
    np.testing.assert_allclose(found, expected, atol=1e-5)
