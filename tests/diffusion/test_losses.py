"""The training loss against plain NumPy, option by option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm, losses
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule

T = 40
NAMES = ("eps", "x0", "v")


def batch(shape=(5, 4, 3, 2)):
    draws = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    x_start, noise, output = (jnp.asarray(draw) for draw in draws)
    return x_start, noise, output, jnp.array([0, 1, 17, 38, 39], jnp.int32)


def loss_of(schedule, **options):
    x_start, noise, output, t = batch()
    x_t = ddpm.q_sample(schedule, x_start, t, noise)
    return losses.ddpm_loss(schedule, output, x_start, x_t, t, noise, **options)


def per_sample(schedule, parameterization, error=np.square):
    x_start, noise, output, t = (np.asarray(a, np.float64) for a in batch())
    abar = np.asarray(schedule.alphas_cumprod, np.float64)[t.astype(int)].reshape(-1, 1, 1, 1)
    target = {
        "eps": noise,
        "x0": x_start,
        "v": np.sqrt(abar) * noise - np.sqrt(1 - abar) * x_start,
    }[parameterization]
    return error(output - target).mean(axis=(1, 2, 3)), t.astype(int)


def huber(d):
    return np.where(np.abs(d) <= 1, d**2 / 2, np.abs(d) - 0.5)


@pytest.mark.parametrize("parameterization", NAMES)
@pytest.mark.parametrize(
    ("loss_type", "error"), [("l2", np.square), ("l1", np.abs), ("huber", huber)]
)
def test_the_ddpm_form(parameterization, loss_type, error):
    schedule = make_schedule("linear", T, parameterization=parameterization)
    loss, metrics = loss_of(
        schedule,
        parameterization=parameterization,
        loss_type=loss_type,
        l_simple_weight=0.7,
        original_elbo_weight=0.2,
    )
    expected, t = per_sample(schedule, parameterization, error)
    vlb = (np.asarray(schedule.lvlb_weights)[t] * expected).mean()
    np.testing.assert_allclose(metrics["loss_simple"], expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_vlb"], vlb, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.7 * expected.mean() + 0.2 * vlb, rtol=1e-5)
    assert set(metrics) == {"loss", "loss_simple", "loss_vlb"}
    assert metrics["loss"] is loss


@pytest.mark.parametrize("learn_logvar", [False, True])
def test_logvar_form(learn_logvar):
    schedule = make_schedule("linear", T)
    logvar = jnp.linspace(-0.5, 1.0, T)
    expected, t = per_sample(schedule, "eps")
    s = np.asarray(logvar, np.float64)[t]
    gamma = (expected / np.exp(s) + s).mean()

    def loss_at(logvar):
        return loss_of(
            schedule,
            logvar=logvar,
            learn_logvar=learn_logvar,
            l_simple_weight=2.0,
            original_elbo_weight=0.1,
        )

    (loss, metrics), gradient = jax.value_and_grad(loss_at, has_aux=True)(logvar)
    vlb = (np.asarray(schedule.lvlb_weights)[t] * expected).mean()
    np.testing.assert_allclose(loss, 2.0 * gamma + 0.1 * vlb, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"], expected.mean(), rtol=1e-5)
    slope = np.zeros(T)
    if learn_logvar:
        np.testing.assert_allclose(metrics["loss_gamma"], gamma, rtol=1e-5)
        np.testing.assert_allclose(metrics["logvar"], 0.25, rtol=1e-5)
        slope[t] = 2.0 * (1 - expected / np.exp(s)) / len(t)
    else:
        assert "loss_gamma" not in metrics and "logvar" not in metrics
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-7)


def test_a_zero_logvar_is_the_ddpm_form():
    schedule = make_schedule("linear", T)
    assert loss_of(schedule, logvar=jnp.zeros(T))[0] == loss_of(schedule)[0]


@pytest.mark.parametrize("parameterization", NAMES)
def test_min_snr_is_one_weight_in_all_parameterizations(parameterization):
    """Errors that mean the same error of x_0 get the same loss, min(snr, gamma) |x_0 error|^2."""
    schedule = make_schedule("linear", T, linear_end=0.2)
    t = jnp.arange(T, dtype=jnp.int32)
    abar = np.cumprod(1 - make_beta_schedule("linear", T, linear_end=0.2))
    snr = abar / (1 - abar)
    unit = {"eps": snr**0.5, "x0": np.ones(T), "v": (snr + 1) ** 0.5}[parameterization]
    weights = losses.min_snr_weights(schedule, t, 5.0, parameterization)
    assert (snr > 5).any() and (snr < 5).any()
    np.testing.assert_allclose(weights * unit**2, np.minimum(snr, 5.0), rtol=1e-5)


def test_min_snr_enters_the_loss_and_not_loss_simple():
    schedule = make_schedule("linear", T)
    expected, t = per_sample(schedule, "eps")
    weights = np.asarray(losses.min_snr_weights(schedule, jnp.asarray(t), 5.0, "eps"))
    loss, metrics = loss_of(schedule, min_snr_gamma=5.0)
    np.testing.assert_allclose(loss, (weights * expected).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"], expected.mean(), rtol=1e-5)


def test_padding_counts_for_nothing():
    schedule = make_schedule("linear", T)
    weight = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    loss, metrics = loss_of(schedule, weight=weight, original_elbo_weight=0.5)
    expected, t = per_sample(schedule, "eps")
    kept = np.array([0, 2, 3])
    vlb = (np.asarray(schedule.lvlb_weights)[t] * expected)[kept].mean()
    np.testing.assert_allclose(metrics["loss_simple"], expected[kept].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, expected[kept].mean() + 0.5 * vlb, rtol=1e-5)
    assert loss_of(schedule, weight=jnp.zeros(5))[0] == 0.0


def test_gradient_of_an_all_padding_batch_is_zero():
    weight = jnp.zeros(3)
    gradient = jax.grad(lambda values: losses.weighted_mean(values, weight))(jnp.ones(3))
    np.testing.assert_array_equal(gradient, 0.0)


def test_half_precision_outputs_are_compared_in_float32():
    schedule = make_schedule("linear", T)
    x_start, noise, output, t = (
        a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a for a in batch()
    )
    x_t = ddpm.q_sample(schedule, x_start, t, noise)
    assert x_t.dtype == jnp.float32
    loss, _ = losses.ddpm_loss(schedule, output, x_start, x_t, t, noise)
    difference = np.asarray(output, np.float64) - np.asarray(noise, np.float64)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.square(difference).mean(), rtol=1e-5)


def test_wrong_names_list_the_choices():
    schedule = make_schedule("linear", T)
    x_start, noise, output, t = batch()
    with pytest.raises(ValueError, match="loss_type = 'l3' is unknown; choose from l2, l1, huber"):
        losses.elementwise_loss(output, noise, "l3")
    with pytest.raises(ValueError, match="parameterization = 'mu' .* eps, x0, v"):
        losses.training_target(schedule, x_start, noise, t, "mu")
    with pytest.raises(ValueError, match="min_snr_gamma = 0.0 should be positive"):
        losses.min_snr_weights(schedule, t, 0.0, "eps")
    with pytest.raises(ValueError, match="learn_logvar = True needs a logvar"):
        loss_of(schedule, learn_logvar=True)
