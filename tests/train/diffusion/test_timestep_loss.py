"""The training loss is the mean over samples of what the equations say, sample by sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.train.diffusion.timestep_loss import diffusion_loss

T = 10
SCHEDULE = make_schedule("cosine", num_timesteps=T, parameterization="v")
FROZEN = {"schedule": SCHEDULE, "logvar": jnp.zeros(T)}


def sample_keys(seed, count):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def images(count):
    return jax.random.normal(jax.random.key(5), (count, 4, 4, 1))


def embed(params, frozen, batch, keys):
    del params, frozen
    return {"vector": batch["label"] if keys is None else -batch["label"]}


def encode(frozen, batch, keys):
    del frozen, keys
    return batch["image"]


def apply(params, x, t, conditioning, dropout_key):
    del t, dropout_key
    return params["scale"] * x + conditioning["vector"][:, None, None, None]


def batch(count):
    return {"image": images(count), "label": jnp.arange(count, dtype=jnp.float32)}


LOSS = diffusion_loss(apply, embed, encode, parameterization="v")
PARAMS = {"scale": jnp.float32(0.5)}


def test_every_sample_depends_on_its_own_key_only():

    def one(i):
        rows = slice(i, i + 1)
        single = {name: value[rows] for name, value in batch(6).items()}
        return float(LOSS(PARAMS, {}, FROZEN, single, sample_keys(0, 6)[rows], train=True)[0])

    whole = float(LOSS(PARAMS, {}, FROZEN, batch(6), sample_keys(0, 6), train=True)[0])
    np.testing.assert_allclose(whole, np.mean([one(i) for i in range(6)]), rtol=1e-5)


def test_training_and_evaluation_condition_differently():
    data = batch(4)
    seen = []

    def spy(params, x, t, conditioning, dropout_key):
        seen.append((conditioning["vector"], dropout_key))
        return x

    loss = diffusion_loss(spy, embed, encode, parameterization="eps")
    loss(PARAMS, {}, FROZEN, data, sample_keys(0, 4), train=True)
    loss(PARAMS, {}, FROZEN, data, sample_keys(0, 4), train=False)
    np.testing.assert_array_equal(seen[0][0], -data["label"])
    np.testing.assert_array_equal(seen[1][0], data["label"])
    assert seen[0][1] is not None and seen[1][1] is None


def test_a_perfect_network_has_no_loss():
    # x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps determines v when x_0 is known.
    data = batch(8)

    def perfect(params, x, t, conditioning, dropout_key):
        del params, conditioning, dropout_key
        a = SCHEDULE.sqrt_alphas_cumprod[t][:, None, None, None]
        s = SCHEDULE.sqrt_one_minus_alphas_cumprod[t][:, None, None, None]
        return (a * x - data["image"]) / s

    loss = diffusion_loss(perfect, embed, encode, parameterization="v")
    assert float(loss(PARAMS, {}, FROZEN, data, sample_keys(1, 8), train=True)[0]) < 1e-6


def test_timesteps_are_uniform_and_noise_is_normal():
    count = 4000
    seen = {}

    def spy(params, x, t, conditioning, dropout_key):
        seen.update(x=x, t=t)
        return x

    zeros = {"image": jnp.zeros((count, 4, 4, 1)), "label": jnp.zeros(count)}
    diffusion_loss(spy, embed, encode, parameterization="eps")(
        PARAMS, {}, FROZEN, zeros, sample_keys(2, count), train=True
    )
    counts = np.bincount(np.asarray(seen["t"]), minlength=T)
    assert len(counts) == T and np.abs(counts - count / T).max() < 5 * np.sqrt(count / T)
    sigma = np.asarray(SCHEDULE.sqrt_one_minus_alphas_cumprod)[np.asarray(seen["t"])]
    noise = np.asarray(seen["x"])[..., 0] / sigma[:, None, None]
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.size)


def test_weights_leave_padding_out():
    padded = batch(6) | {"weight": jnp.array([1.0, 1, 1, 1, 0, 0])}
    four = {name: value[:4] for name, value in batch(6).items()}
    expected = LOSS(PARAMS, {}, FROZEN, four, sample_keys(0, 4), train=False)[0]
    found = LOSS(PARAMS, {}, FROZEN, padded, sample_keys(0, 6), train=False)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("learned", [True, False])
def test_logvar_comes_from_the_parameters_when_it_is_learned(learned):
    logvar = jnp.full(T, 2.0)
    params = PARAMS | ({"logvar": logvar} if learned else {})
    frozen = FROZEN | {"logvar": jnp.zeros(T) if learned else logvar}
    loss = diffusion_loss(apply, embed, encode, parameterization="v", learn_logvar=learned)
    (value, _), gradient = jax.value_and_grad(
        lambda p: loss(p, {}, frozen, batch(6), sample_keys(0, 6), train=True), has_aux=True
    )(params)
    plain = LOSS(PARAMS, {}, FROZEN, batch(6), sample_keys(0, 6), train=True)[0]
    np.testing.assert_allclose(value, plain / np.exp(2.0) + 2.0, rtol=1e-5)
    assert ("logvar" in gradient) == learned
    if learned:
        assert np.any(np.asarray(gradient["logvar"]))


def test_it_denoises_what_encode_finds_and_encodes_each_sample_with_its_own_key():
    seen = []

    def noisy(frozen, batch, keys):
        assert frozen is FROZEN
        seen.append(jax.random.key_data(keys))
        return 2.0 * batch["image"] + jax.vmap(jax.random.normal)(keys)[:, None, None, None]

    def perfect(params, x, t, conditioning, dropout_key):
        return x

    loss = diffusion_loss(perfect, embed, noisy, parameterization="v")
    first = loss(PARAMS, {}, FROZEN, batch(4), sample_keys(0, 4), train=True)[0]
    plain = diffusion_loss(perfect, embed, encode, parameterization="v")
    second = plain(PARAMS, {}, FROZEN, batch(4), sample_keys(0, 4), train=True)[0]
    assert abs(float(first) - float(second)) > 0.1
    assert len(np.unique(seen[0], axis=0)) == 4


def test_a_loss_mask_leaves_pixels_out():
    """Errors outside of the mask do not matter, whatever they are."""
    mask = jnp.zeros((2, 4, 4, 1)).at[:, :2].set(1.0)
    data = batch(2)

    def loss(image, **more):
        given = data | {"image": image} | more
        return float(LOSS(PARAMS, {}, FROZEN, given, sample_keys(0, 2), train=False)[0])

    other = data["image"].at[:, 2:].set(7.0)
    assert loss(data["image"]) != loss(other)
    assert loss(data["image"], loss_mask=mask) == loss(other, loss_mask=mask) > 0.0
    whole = loss(data["image"], loss_mask=jnp.ones((2, 4, 4, 1)))
    np.testing.assert_allclose(whole, loss(data["image"]), rtol=1e-6)


def test_the_weight_of_a_sample_multiplies_its_loss():
    """It is not normalised: in a batch of one, a weight of a half halves the loss."""

    def loss(rows, **more):
        data = {name: value[rows] for name, value in batch(3).items()} | more
        return LOSS(PARAMS, {}, FROZEN, data, sample_keys(0, 3)[rows], train=True)[0]

    alone = [loss(slice(i, i + 1)) for i in range(3)]
    half = loss(slice(1), loss_weight=jnp.array([0.5]))
    np.testing.assert_allclose(half, 0.5 * alone[0], rtol=1e-6)
    weights = jnp.array([2.0, 0.0, 0.25])
    whole = loss(slice(3), loss_weight=weights)
    np.testing.assert_allclose(whole, np.mean(np.array(weights) * alone), rtol=1e-5)
