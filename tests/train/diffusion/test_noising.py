"""Noise has the variance and the correlations of its equations; perturbation spares the target."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import preconditioning, weighting
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.randomness import sample_keys
from diffusion_jax.train.diffusion.denoiser_loss import denoiser_loss_fn
from diffusion_jax.train.diffusion.noising import (
    PLAIN,
    NoiseOptions,
    check_noising,
    draw_noise,
)
from diffusion_jax.train.diffusion.timestep_loss import diffusion_loss

COUNT = 20_000
T = 10
FROZEN = {"schedule": make_schedule("linear", num_timesteps=T), "logvar": jnp.zeros(T)}


def keys(count=COUNT, seed=0):
    return sample_keys(jax.random.key(seed), jnp.arange(count))


def covariance(options, shape=(5, 6, 1), count=COUNT):
    found, _ = draw_noise(keys(count), keys(count, 1), shape, options)
    noise = np.asarray(found, np.float64).reshape(count, -1)
    return noise.T @ noise / count


def pyramid_correlation(shape, discount, levels):
    """The closed form: triangles of the widths 1, 2, 4, ..., in both directions."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 2)
    apart = np.abs(places[:, None] - places[None])
    shares = [np.prod(np.maximum(0, 1 - apart / 2**j), -1) for j in range(levels + 1)]
    weights = discount ** (2.0 * np.arange(levels + 1))
    return np.tensordot(weights / weights.sum(), shares, 1)


def test_plain_noise_is_the_noise_of_its_keys():
    found, seen = draw_noise(keys(3), keys(3, 1), (4, 4, 1), PLAIN)
    want = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(keys(3))
    np.testing.assert_array_equal(found, want)
    assert seen is found


@pytest.mark.parametrize(("discount", "levels", "used"), [(0.8, 2, 2), (0.5, 9, 3)])
def test_pyramid_noise_has_variance_one_and_correlates_over_its_squares(discount, levels, used):
    options = NoiseOptions(pyramid_noise_discount=discount, pyramid_noise_levels=levels)
    want = pyramid_correlation((5, 6), discount, used)
    # The standard error of a covariance of unit normals is at most sqrt(2 / n).
    np.testing.assert_allclose(covariance(options), want, atol=5 * np.sqrt(2 / COUNT))
    assert want[0, 1] > 0.1


def test_channels_and_frames_have_noise_of_their_own():
    options = NoiseOptions(pyramid_noise_discount=1.0, pyramid_noise_levels=3)
    found = covariance(options, (2, 2, 2, 2), 4000).reshape(2, 4, 2, 2, 4, 2)
    for one in (found[0, :, :, 1], found[:, :, 0, :, :, 1]):  # of two frames, of two channels
        assert np.abs(one).max() < 6 / np.sqrt(4000)
    assert abs(found[0, 0, 0, 0, 1, 0] - 0.25) < 6 / np.sqrt(4000)


def test_an_offset_comes_on_top_of_a_pyramid():
    options = NoiseOptions(0.5, pyramid_noise_discount=0.8, pyramid_noise_levels=2)
    want = pyramid_correlation((5, 6), 0.8, 2) + 0.25
    np.testing.assert_allclose(covariance(options), want, atol=5 * 1.25 * np.sqrt(2 / COUNT))


def test_an_offset_alone_draws_from_the_key_itself():
    found, _ = draw_noise(keys(3), keys(3, 1), (4, 4, 2), NoiseOptions(0.5))
    shift = jax.vmap(lambda key: jax.random.normal(key, (1, 1, 2)))(keys(3, 1))
    plain, _ = draw_noise(keys(3), keys(3, 1), (4, 4, 2), PLAIN)
    np.testing.assert_array_equal(found, plain + jnp.float32(0.5) * shift)


def test_noise_of_a_sample_comes_from_its_key():
    options = NoiseOptions(0.5, 0.8, 3, 0.1)
    whole = draw_noise(keys(6), keys(6, 1), (4, 4, 2), options)
    two = draw_noise(keys(6)[2:4], keys(6, 1)[2:4], (4, 4, 2), options)
    for one, other in zip(two, whole, strict=True):
        np.testing.assert_allclose(one, other[2:4], rtol=1e-6)


def test_perturbation_is_normal_and_independent_of_the_noise():
    options = NoiseOptions(input_perturbation=0.1)
    noise, seen = draw_noise(keys(), keys(seed=1), (2, 2, 1), options)
    more = np.asarray(seen - noise).ravel()
    bound = 5 / np.sqrt(more.size)
    assert abs(more.std() / 0.1 - 1) < bound and abs(more.mean() / 0.1) < bound
    assert abs(np.corrcoef(more, noise.ravel())[0, 1]) < bound


def spied(make, options, output, train=True):
    """The loss of a network, and what the network saw."""
    seen = {}

    def apply(params, x, level, conditioning, dropout_key):
        seen.update(x=x, level=level)
        return output(x)

    loss_fn = make(apply, lambda *_: {}, lambda frozen, batch, keys: batch["image"], options)
    image = jax.random.normal(jax.random.key(5), (6, 4, 4, 1))
    batch = {"image": image, "position": jnp.arange(6)}
    loss, _ = loss_fn({}, {}, FROZEN, batch, keys(6), train=train)
    return loss, seen


def timestep(apply, embed, encode, options):
    return diffusion_loss(apply, embed, encode, noising=options, parameterization="eps")


def denoising(scaling):
    def make(apply, embed, encode, options):
        return denoiser_loss_fn(
            apply, embed, encode, noising=options, scaling=scaling, batch_size=6,
            sigma_of=lambda u: 0.1 + 2 * u, weighting=weighting.unit(),
        )  # fmt: skip

    return make


SCALINGS = (
    preconditioning.eps(),
    preconditioning.v(),
    preconditioning.edm(),
    preconditioning.flow(),
)
LOSSES = {"ddpm": timestep} | {str(i): denoising(s) for i, s in enumerate(SCALINGS)}


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_perturbation_changes_what_the_network_sees_and_not_its_target(make):
    """A network that does not look at its input has the same loss with it."""
    options, blind = NoiseOptions(input_perturbation=0.3), lambda x: jnp.full_like(x, 0.2)
    plain, clean = spied(make, PLAIN, blind)
    loss, seen = spied(make, options, blind)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    assert np.abs(seen["x"] - clean["x"]).max() > 0.01
    np.testing.assert_array_equal(seen["level"], clean["level"])
    assert spied(make, options, jnp.sin)[0] != spied(make, PLAIN, jnp.sin)[0]
    # Evaluation sees inputs as they are.
    still = spied(make, options, blind, train=False)[1]
    np.testing.assert_array_equal(still["x"], spied(make, PLAIN, blind, train=False)[1]["x"])


def test_both_losses_perturb_alike():
    """The input moves by input_perturbation times the noise of its level, N(0, 1)."""
    options, blind = NoiseOptions(input_perturbation=0.3), jnp.zeros_like
    drawn, moved = draw_noise(_keys(1), _keys(5), (4, 4, 1), options)
    more = (moved - drawn) / 0.3
    clean, seen = (spied(timestep, o, blind)[1] for o in (PLAIN, options))
    scale = FROZEN["schedule"].sqrt_one_minus_alphas_cumprod[clean["level"]]
    want = 0.3 * scale[:, None, None, None] * more
    np.testing.assert_allclose(seen["x"] - clean["x"], want, atol=1e-5)
    clean, seen = (spied(LOSSES["3"], o, blind)[1] for o in (PLAIN, options))
    t = (clean["level"] / 1000.0)[:, None, None, None]  # flow matching: x = (1 - t) x_0 + t eps
    np.testing.assert_allclose(seen["x"] - clean["x"], 0.3 * t * more, atol=1e-5)


def _keys(number):
    return jax.vmap(lambda key: jax.random.split(key, 6))(keys(6))[:, number]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (NoiseOptions(offset_noise_level=-1.0), "offset_noise_level = -1.0 should be at least 0"),
        (NoiseOptions(input_perturbation=-0.1), "input_perturbation = -0.1 should be at least 0"),
        (NoiseOptions(pyramid_noise_discount=1.5), "discount = 1.5 should be between 0 and 1"),
        (NoiseOptions(pyramid_noise_levels=0), "pyramid_noise_levels = 0 should be at least 1"),
    ],
)
def test_numbers_out_of_range_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_noising(options)
