"""Errors in closed form, heat maps by their colours, and which networks drew which picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.train.first_stage.loss import Networks
from diffusion_jax.train.first_stage.pictures import (
    HEAT_COLOURS,
    autoencoder_images,
    error_images,
    heat_colours,
    logit_images,
)
from diffusion_jax.train.hooks.images import picture

RGB = 2.0 * np.asarray(HEAT_COLOURS, np.float32) - 1.0


def test_errors_in_closed_form():
    image = jnp.asarray([0.0, 0.0, 1.0, -1.0, 0.5]).reshape(1, 1, 5, 1)
    shown = jnp.asarray([0.0, 0.4, -1.0, 3.0, 7.0]).reshape(1, 1, 5, 1)
    log = error_images(image, shown)
    # halves of |clip(shown) - image|: 0, 0.2, 1, 1, 0.25
    np.testing.assert_allclose(log["diff"].reshape(-1), [-1.0, -0.6, 1.0, 1.0, -0.5], atol=1e-6)
    np.testing.assert_allclose(log["diff_boost"].reshape(-1), [-1, 0.2, 1, 1, 0.5], atol=1e-6)
    np.testing.assert_array_equal(log["reconstructions"], shown)
    boosted = error_images(image, shown, diff_boost_factor=2.0)["diff_boost"]
    np.testing.assert_allclose(boosted.reshape(-1), [-1, -0.2, 1, 1, 0], atol=1e-6)


def test_colours_run_through_the_table():
    values = jnp.asarray([[-1.0, -0.5, 0.0], [0.5, 1.0, 0.25]])
    colours = heat_colours(values)
    np.testing.assert_allclose(colours[0], RGB[:3], atol=1e-6)
    np.testing.assert_allclose(colours[1, :2], RGB[3:], atol=1e-6)
    np.testing.assert_allclose(colours[1, 2], (RGB[2] + RGB[3]) / 2, atol=1e-6)
    assert colours[0, 0, 0] > colours[0, 0, 1] and colours[1, 1, 1] > colours[1, 1, 0]


def test_heat_maps_of_logits():
    image, shown = jnp.full((1, 3, 5, 3), 0.2), jnp.full((1, 3, 5, 3), -0.6)
    real = jnp.asarray([[1.0, 4.0]]).reshape(1, 1, 2, 1)
    fake = jnp.asarray([[-2.0, 0.0]]).reshape(1, 1, 2, 1)
    log = logit_images(image, shown, real, fake)
    assert {name: value.shape for name, value in log.items()} == {
        "vis_logits": (1, 2, 3, 5, 3),
        "vis_logits_blended": (1, 2, 3, 5, 3),
    }
    heat, blended = (np.asarray(value)[0] for value in log.values())
    # the largest |logit| is 4; of five columns floor(x 2 / 5) = 0 0 0 1 1
    near = lambda a, b: np.testing.assert_allclose(a, np.broadcast_to(b, a.shape), atol=1e-6)
    near(heat[0, :, :3], (RGB[2] + RGB[3]) / 2)
    near(heat[0, :, 3:], RGB[4])
    near(heat[1, :, :3], RGB[1])
    near(heat[1, :, 3:], RGB[2])
    near(blended[0, :, :3], 0.2 * heat[0, 0, 0] + 0.8 * 0.2)
    near(blended[0, :, 3:], 0.8 * RGB[4] + 0.2 * 0.2)
    near(blended[1, :, :3], 0.4 * RGB[1] + 0.6 * -0.6)
    near(blended[1, :, 3:], -0.6)


def test_maps_are_resized_to_the_nearest_from_above():
    image = jnp.zeros((1, 6, 8, 1))
    real = jnp.arange(12.0).reshape(1, 3, 4, 1) - 20.0  # -20 is the largest |logit|
    heat = np.asarray(logit_images(image, image, real, jnp.zeros_like(real))["vis_logits"])
    colours = np.asarray(heat_colours(real[0, :, :, 0] / 20.0))
    for row in range(6):
        for column in range(8):
            np.testing.assert_array_equal(heat[0, 0, row, column], colours[row // 2, column // 2])


def test_logits_of_zero_leave_the_pictures():
    image, zeros = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1), jnp.zeros((1, 2, 2, 1))
    log = logit_images(image, -image, zeros, zeros)
    expected = np.repeat(np.stack([image, -image], axis=1), 3, axis=-1)
    np.testing.assert_allclose(log["vis_logits_blended"], expected, atol=1e-6)


def networks(rank=4):
    """Latents are half the size; everything is the parameter times something visible."""

    def regularize(params, mutable, moments, keys, *, train, step=None):
        assert not train
        noise = jax.vmap(lambda key: jax.random.normal(key, moments.shape[1:]))(keys)
        return moments + 0.1 * noise, {}, mutable

    def discriminate(params, mutable, image, *, train):
        assert not train
        logits = params * image.mean(axis=-1, keepdims=True)[:, ::4, ::4]
        return (logits if rank == 4 else logits.mean(axis=(1, 2))), mutable

    def encode(params, image, key):
        assert key is None
        return image[:, ::2, ::2]

    def decode(params, z, key):
        assert key is None
        return params * z.repeat(2, axis=1).repeat(2, axis=2)

    return Networks(encode, regularize, decode, discriminate, lambda *a: a[1], ("kernel",))


PARAMS = {"autoencoder": jnp.float32(0.5), "discriminator": jnp.float32(-1.0)}
MUTABLE = {"regularizer": {}, "discriminator": {}}


@pytest.mark.parametrize("averaged", [False, True])
def test_pictures_of_a_batch(averaged):
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
    average = {"autoencoder": jnp.float32(1.5)} if averaged else None
    draw = jax.jit(
        lambda image, keys: autoencoder_images(
            networks(), PARAMS, MUTABLE, image, keys, averaged=average
        )
    )
    log = draw(image, jax.random.split(jax.random.key(0), 3))
    plain = {"reconstructions", "diff", "diff_boost", "samples"}
    ema = {f"{name}_ema" for name in plain} if averaged else set()
    assert set(log) == plain | ema | {"inputs", "vis_logits", "vis_logits_blended"}
    np.testing.assert_array_equal(log["inputs"], image)
    for name, value in log.items():
        assert value.shape == ((3, 2, 8, 8, 3) if name.startswith("vis") else (3, 8, 8, 3))
        assert picture(np.asarray(value), name, max_images=4).dtype == np.uint8
    expected = logit_images(
        image,
        log["reconstructions"],
        -image.mean(axis=-1, keepdims=True)[:, ::4, ::4],
        -log["reconstructions"].mean(axis=-1, keepdims=True)[:, ::4, ::4],
    )
    np.testing.assert_allclose(log["vis_logits"], expected["vis_logits"], atol=1e-5)
    # decoded N(0, 1), not the image: half a normal number, the same in blocks of four pixels
    samples = np.asarray(log["samples"])
    np.testing.assert_array_equal(samples[:, ::2, ::2], samples[:, 1::2, 1::2])
    assert abs(samples.std() - 0.5) < 0.1 and abs(samples.mean()) < 0.1
    if averaged:  # three times the decoder, on the same latents
        for name in ("samples", "reconstructions"):
            np.testing.assert_allclose(log[f"{name}_ema"], 3 * log[name], rtol=1e-5)


def test_without_samples_and_without_places():
    image, keys = jnp.zeros((1, 8, 8, 3)), jax.random.split(jax.random.key(0), 1)
    log = autoencoder_images(networks(rank=2), PARAMS, MUTABLE, image, keys, samples=False)
    assert set(log) == {"inputs", "reconstructions", "diff", "diff_boost"}
