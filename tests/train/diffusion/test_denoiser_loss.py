"""The denoiser's training loss: noise levels, keys, strata; a network that learns a Gaussian."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.diffusion import losses, preconditioning, sigma_sampling, weighting
from diffusion_jax.diffusion.samplers.sigmas import legacy_ddpm, sigma_table
from diffusion_jax.train.diffusion.denoiser_loss import denoiser_loss_fn
from diffusion_jax.train.diffusion.noising import NoiseOptions
from diffusion_jax.train.state import init_state
from diffusion_jax.train.step import jit_train_step, make_eval_step, make_train_step

PARAMS = {"scale": jnp.float32(0.5)}
LOGNORMAL = sigma_sampling.lognormal()


def sample_keys(seed, count):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def encode(frozen, batch, keys):
    del frozen, keys
    return batch["image"]


def embed(params, frozen, batch, keys):
    del params, frozen
    return {"vector": batch["label"] if keys is None else -batch["label"]}


def apply(params, x, c_noise, conditioning, dropout_key):
    del dropout_key
    shift = conditioning["vector"] + 0.1 * c_noise.astype(jnp.float32)
    return params["scale"] * jnp.sin(x) + shift[:, None, None, None]


def batch(count):
    image = jax.random.normal(jax.random.key(5), (count, 4, 4, 1))
    label = jnp.arange(count, dtype=jnp.float32)
    return {"image": image, "label": label, "position": jnp.arange(count, dtype=jnp.int32)}


def make(apply=apply, embed=embed, encode=encode, **options):
    given: dict[str, Any] = dict(
        scaling=preconditioning.edm(), sigma_of=LOGNORMAL, weighting=weighting.edm(), batch_size=6
    )
    return denoiser_loss_fn(apply, embed, encode, **given | options)


def capture(frozen, data, keys, train=True, **options):
    """What the network was given, beside the loss."""
    seen = {}

    def spy(params, x, c_noise, conditioning, dropout_key):
        seen.update(x=x, c_noise=c_noise, conditioning=conditioning, dropout_key=dropout_key)
        return x

    loss, _ = make(spy, **options)(PARAMS, {}, frozen, data, keys, train=train)
    return loss, seen


@pytest.mark.parametrize("stratified", [False, True])
def test_every_sample_depends_on_its_own_key_only(stratified):
    loss_fn = make(stratified=stratified, noising=NoiseOptions(0.1))

    @jax.jit
    def loss(data, keys):
        return loss_fn(PARAMS, {}, {}, data, keys, train=True)[0]

    def one(i):
        rows = slice(i, i + 1)
        return loss({k: v[rows] for k, v in batch(6).items()}, sample_keys(0, 6)[rows])

    whole = loss(batch(6), sample_keys(0, 6))
    np.testing.assert_allclose(whole, np.mean([one(i) for i in range(6)]), rtol=1e-5)


def test_the_loss_is_the_equation_at_the_noise_that_was_drawn():
    """x and sigma are recovered from what the network saw; the rest is written out in NumPy."""
    data, keys = batch(6), sample_keys(3, 6)
    scaling = preconditioning.edm()
    loss, seen = capture({}, data, keys, noising=NoiseOptions(0.2))
    sigma = np.exp(4 * np.asarray(seen["c_noise"], np.float64))[:, None, None, None]
    x = np.asarray(seen["x"]) * np.sqrt(sigma**2 + 0.25)
    denoised = 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / np.sqrt(sigma**2 + 0.25) * seen["x"]
    errors = np.mean((denoised - np.asarray(data["image"])) ** 2, axis=(1, 2, 3))
    weights = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    np.testing.assert_allclose(loss, np.mean(weights.ravel() * errors), rtol=1e-3)
    c = scaling(jnp.asarray(sigma.ravel(), jnp.float32))
    np.testing.assert_allclose(c.c_noise, seen["c_noise"], rtol=1e-5)
    assert len(np.unique(sigma)) == 6


def test_noise_is_normal_with_offset_and_sigma_has_its_distribution():
    count = 4000
    zeros = {"image": jnp.zeros((count, 4, 4, 1)), "label": jnp.zeros(count)}
    options: dict[str, Any] = dict(scaling=preconditioning.v_edm(), weighting=weighting.unit())
    for level in (0.0, 0.5):
        _, seen = capture({}, zeros, sample_keys(2, count), noising=NoiseOptions(level), **options)
        log_sigma = 4 * np.asarray(seen["c_noise"], np.float64)
        assert abs(log_sigma.mean() + 1.2) < 5 * 1.2 / np.sqrt(count)
        assert abs(log_sigma.std() - 1.2) < 5 * 1.2 / np.sqrt(2 * count)
        sigma = np.exp(log_sigma)[:, None]
        noise = np.asarray(seen["x"]).reshape(count, 16) * np.sqrt(sigma**2 + 1) / sigma
        # 16 pixels share the offset: the variance of their mean is 1 / 16 + level^2.
        within = noise - noise.mean(axis=1, keepdims=True)
        assert abs(within.var() * 16 / 15 - 1) < 5 * np.sqrt(2 / noise.size)
        variance = 1 / 16 + level**2
        assert abs(noise.mean(axis=1).var() - variance) < 5 * variance * np.sqrt(2 / count)
        assert abs(np.corrcoef(log_sigma, noise[:, 0])[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize("quantize_c_noise", [True, False])
def test_a_table_makes_the_denoiser_discrete(quantize_c_noise):
    table = sigma_table(legacy_ddpm)
    _, seen = capture(
        {"sigmas": table},
        batch(6),
        sample_keys(0, 6),
        scaling=preconditioning.eps(),
        sigma_of=sigma_sampling.discrete(),
        quantize_c_noise=quantize_c_noise,
    )
    if quantize_c_noise:
        assert seen["c_noise"].dtype == jnp.int32
    else:
        assert np.all(np.isin(np.asarray(seen["c_noise"]), np.asarray(table)))


def test_training_and_evaluation_condition_differently():
    data = batch(4)
    _, train = capture({}, data, sample_keys(0, 4))
    _, evaluation = capture({}, data, sample_keys(0, 4), train=False)
    np.testing.assert_array_equal(train["conditioning"]["vector"], -data["label"])
    np.testing.assert_array_equal(evaluation["conditioning"]["vector"], data["label"])
    assert train["dropout_key"] is not None and evaluation["dropout_key"] is None


def test_evaluation_draws_independently_whatever_its_batch_size():
    plain, seen = capture({}, batch(4), sample_keys(0, 4), train=False)
    other, _ = capture({}, batch(4), sample_keys(0, 4), train=False, stratified=True, batch_size=99)
    assert plain == other
    assert plain != capture({}, batch(4), sample_keys(0, 4), stratified=True, batch_size=4)[0]


def test_encode_is_given_its_own_keys_and_latents_may_be_half_precision():
    def noisy_latents(frozen, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (4, 4, 1)))(keys)
        return (frozen["gain"] * batch["image"] + noise).astype(jnp.bfloat16)

    def loss_of(rows):
        data = {name: value[rows] for name, value in batch(6).items()}
        return capture({"gain": 2.0}, data, sample_keys(0, 6)[rows], encode=noisy_latents)

    loss, seen = loss_of(slice(0, 6))
    assert seen["x"].dtype == jnp.float32 and loss.dtype == jnp.float32
    halves = [loss_of(rows)[0] for rows in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(loss, np.mean(halves), rtol=1e-5)


def test_weights_leave_padding_out():
    padded = batch(6) | {"weight": jnp.array([1.0, 1, 1, 1, 0, 0])}
    four = {name: value[:4] for name, value in batch(6).items()}
    expected = make()(PARAMS, {}, {}, four, sample_keys(0, 4), train=False)[0]
    found = make()(PARAMS, {}, {}, padded, sample_keys(0, 6), train=False)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def quantile_sums(accumulate, batch_size=12):
    """Train one step on a network whose gradient counts how often each stratum is visited."""

    def count_strata(params, x, c_noise, conditioning, dropout_key):
        stratum = jnp.floor(c_noise * batch_size).astype(jnp.int32)
        visits = params["visits"][stratum]
        return x * 0.0 + visits[:, None, None, None]

    # D = F, so that with |D - 0| the gradient of entry i is its share of the batch.
    loss = make(
        count_strata,
        scaling=preconditioning.x0(),
        sigma_of=lambda u: u,
        weighting=weighting.unit(),
        loss_type="l1",
        batch_size=batch_size,
        stratified=True,
    )
    tx = optax.sgd(1.0)
    state = init_state({"visits": jnp.ones(batch_size)}, tx, {})
    step = make_train_step(loss, tx, seed=0, accumulate=accumulate)
    data = {"image": jnp.zeros((batch_size, 2, 2, 1)), "label": jnp.zeros(batch_size)}
    state, _ = jax.jit(step)(state, data, {})
    return 1.0 - np.asarray(state.params["visits"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_global_batch_covers_each_stratum_once(accumulate):
    np.testing.assert_allclose(quantile_sums(accumulate), 1 / 12, rtol=1e-5)


def test_a_linear_network_learns_the_optimal_denoiser_of_a_gaussian():
    """Data N(mean, std^2): D(x) = (std^2 x + sigma^2 mean) / (std^2 + sigma^2) at each level."""
    mean, std, sigmas = 0.6, 0.4, jnp.array([0.1, 0.4, 1.0, 5.0])

    def linear(params, x, index, conditioning, dropout_key):
        a, b = (params[name][index][:, None, None, None] for name in ("a", "b"))
        return a * x + b

    loss = denoiser_loss_fn(
        linear,
        lambda params, frozen, batch, keys: {},
        encode,
        scaling=preconditioning.v(),
        sigma_of=sigma_sampling.discrete(
            lambda n: np.append(np.asarray(sigmas)[::-1], 0), num_idx=4
        ),
        weighting=weighting.v(),
        batch_size=64,
        stratified=True,
    )
    tx = optax.adam(optax.linear_schedule(0.1, 0.0, 300))
    state = init_state({"a": jnp.zeros(4), "b": jnp.zeros(4)}, tx, {})
    step = jit_train_step(make_train_step(loss, tx, seed=0), state)
    evaluate = jax.jit(make_eval_step(loss, seed=0))
    frozen = {"sigmas": sigmas}

    def images(i):
        noise = np.random.default_rng(i).standard_normal((64, 8, 8, 1), np.float32)
        return {"image": jnp.asarray(mean + std * noise)}

    for i in range(300):
        state, _ = step(state, images(i), frozen)
    x = jnp.linspace(-1.0, 2.0, 4 * 5).reshape(4, 5, 1, 1)
    denoise = preconditioning.denoiser(
        lambda x, c, conditioning: linear(state.params, x, c, conditioning, None),
        preconditioning.v(),
        sigmas,
    )
    s = np.asarray(sigmas)[:, None, None, None]
    optimal = (std**2 * np.asarray(x) + s**2 * mean) / (std**2 + s**2)
    np.testing.assert_allclose(denoise(x, sigmas, {}), optimal, atol=0.02)
    # And no denoiser does better than the posterior variance.
    metrics = evaluate(state.params, {}, frozen, images(999), 0)
    floor = np.mean((std * s) ** 2 / (std**2 + s**2))
    np.testing.assert_allclose(metrics["loss_x0"], floor, rtol=0.15)


def test_the_objective_is_sgms_standard_loss():
    """D = x - sigma F with eps weighting is |F - eps|^2, whatever F says."""
    data, keys = batch(6), sample_keys(8, 6)
    seen = {}

    def spy(params, x, c_noise, conditioning, dropout_key):
        sigma = c_noise[:, None, None, None]
        noise = (x * jnp.sqrt(sigma**2 + 1) - data["image"]) / sigma
        seen["error"] = jnp.mean((jnp.cos(x) - noise) ** 2)
        return jnp.cos(x)

    loss = make(spy, scaling=preconditioning.eps(), weighting=weighting.eps())
    value, (metrics, mutable) = loss(PARAMS, {"a": 1}, {}, data, keys, train=True)
    np.testing.assert_allclose(value, seen["error"], rtol=1e-3)
    assert mutable == {"a": 1} and set(metrics) == {"loss", "loss_x0"}


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="batch_size = 0 should be at least 1"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="offset_noise_level = -0.1 should be at least 0"):
        make(noising=NoiseOptions(-0.1))
    with pytest.raises(ValueError, match="loss_type = 'l3' is unknown"):
        losses.elementwise_loss(jnp.ones(2), jnp.ones(2), "l3")


def test_the_weight_of_a_sample_multiplies_its_loss_and_its_gradient():
    weights = jnp.array([2.0, 0.0, 0.25])
    loss_fn = jax.jit(jax.value_and_grad(make(), has_aux=True), static_argnames="train")

    def of_rows(data, rows):
        part = {name: value[rows] for name, value in data.items()}
        (loss, _), gradient = loss_fn(PARAMS, {}, {}, part, sample_keys(0, 3)[rows], train=True)
        return np.array([loss, gradient["scale"]])

    alone = np.stack([of_rows(batch(3), slice(i, i + 1)) for i in range(3)])
    data = batch(3) | {"loss_weight": weights}
    want = np.mean(np.array(weights)[:, None] * alone, axis=0)
    np.testing.assert_allclose(of_rows(data, slice(3)), want, rtol=1e-5)
    np.testing.assert_allclose(of_rows(data, slice(2, 3)), 0.25 * alone[2], rtol=1e-6)
