"""The training loss against plain NumPy, option by option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm, losses, weighting
from diffusion_jax.diffusion.preconditioning import SCALINGS, denoiser, output_from_start
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


def network(x, t, conditioning):
    del conditioning
    return jnp.sin(x + 0.1 * t.astype(jnp.float32)[:, None, None, None])


@pytest.mark.parametrize(
    ("parameterization", "name"), [("eps", "eps"), ("v", "v"), ("x0", "unit"), ("v", "min_snr")]
)
def test_the_denoiser_loss_is_the_ddpm_loss_of_the_same_network(parameterization, name):
    """A discrete denoiser at sigma_t = sqrt(1 / abar - 1) against ddpm_loss at t, same noise."""
    schedule = make_schedule("linear", T, linear_end=0.2)
    x_start, noise, _, t = batch()
    x_t = ddpm.q_sample(schedule, x_start, t, noise)
    expected, _ = losses.ddpm_loss(
        schedule,
        network(x_t, t, {}),
        x_start,
        x_t,
        t,
        noise,
        parameterization=parameterization,
        min_snr_gamma=5.0 if name == "min_snr" else None,
    )
    sigmas = schedule.sqrt_recipm1_alphas_cumprod
    sigma = sigmas[t]
    denoise = denoiser(network, SCALINGS[parameterization](), sigmas)
    denoised = denoise(x_start + sigma[:, None, None, None] * noise, sigma, {})
    loss, _ = losses.denoiser_loss(denoised, x_start, sigma, weighting.WEIGHTINGS[name]())
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_edm_loss_is_the_error_of_f():
    """Karras et al., equation 8: with lambda = 1 / c_out^2, the loss is |F - F_target|^2."""
    x_start, noise, _, _ = batch()
    sigma = jnp.array([0.02, 0.3, 0.5, 2.0, 70.0])
    x = x_start + sigma[:, None, None, None] * noise
    scaling = SCALINGS["edm"](sigma_data=0.7)
    seen = {}

    def spy(x, c_noise, conditioning):
        seen["F"] = network(x, c_noise, conditioning)
        return seen["F"]

    denoised = denoiser(spy, scaling)(x, sigma, {})
    loss, metrics = losses.denoiser_loss(denoised, x_start, sigma, weighting.edm(sigma_data=0.7))
    target = output_from_start(scaling, x_start, x, sigma)
    np.testing.assert_allclose(loss, jnp.mean((seen["F"] - target) ** 2), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss_x0"], jnp.mean((denoised - x_start) ** 2), rtol=1e-5)


@pytest.mark.parametrize(("loss_type", "error"), [("l2", np.square), ("l1", np.abs)])
def test_denoiser_loss_weighs_samples_and_leaves_padding_out(loss_type, error):
    x_start, _, denoised, _ = batch()
    sigma = jnp.array([0.1, 0.5, 1.0, 3.0, 20.0])
    weight = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    loss, metrics = losses.denoiser_loss(
        denoised, x_start, sigma, weighting.eps(), loss_type=loss_type, weight=weight
    )
    errors = error(np.asarray(denoised, np.float64) - np.asarray(x_start)).mean(axis=(1, 2, 3))
    kept = np.array([0, 2, 3])
    expected = (np.asarray(sigma, np.float64) ** -2 * errors)[kept].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_x0"], errors[kept].mean(), rtol=1e-5)
    assert set(metrics) == {"loss", "loss_x0"} and metrics["loss"] is loss


@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 8, 8, 3)])
def test_offset_noise_shifts_whole_channels(shape):
    keys = lambda: jax.random.split(jax.random.key(0), 400)
    noise = jnp.zeros((400, *shape))
    shift = np.asarray(losses.offset_noise(noise, keys(), 0.1)).reshape(400, -1, 3)
    np.testing.assert_array_equal(shift, np.broadcast_to(shift[:, :1], shift.shape))
    first = shift[:, 0]
    assert len(np.unique(first)) == 1200
    assert abs(first.std() - 0.1) < 5 * 0.1 / np.sqrt(2 * 1200)
    two = losses.offset_noise(noise[3:5] + 1.0, keys()[3:5], 0.1)
    np.testing.assert_allclose(np.asarray(two).reshape(2, -1, 3), 1.0 + shift[3:5], rtol=1e-6)


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


def test_weights_of_cells_multiply_the_errors_and_are_not_normalised():
    """Half of the cells count half, and the others not at all: l is the mean over all of them."""
    schedule = make_schedule("linear", num_timesteps=T)
    x_start, noise, output, t = batch()
    cells = np.zeros((5, 4, 3, 1), np.float32)
    cells[:, :2] = 0.5
    error = np.square(np.asarray(output, np.float64) - np.asarray(noise))
    want = (cells * error).mean()
    loss, metrics = loss_of(schedule, cells=jnp.asarray(cells))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_simple"], want, rtol=1e-5)
    del x_start, t
    one = lambda sigma: jnp.ones_like(sigma)  # noqa: E731
    got, _ = losses.denoiser_loss(output, noise, jnp.ones(5), one, cells=jnp.asarray(cells))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_pixels_are_averaged_over_the_cells_that_they_belong_to():
    pixels = np.zeros((1, 4, 6, 1), np.float32)
    pixels[0, :2, :3], pixels[0, 3, 5] = 1.0, 1.0
    batch = {"loss_mask": jnp.asarray(pixels)}
    found = losses.cells_of(batch, jnp.zeros((1, 2, 2, 4)))
    assert found is not None
    np.testing.assert_allclose(found[0, ..., 0], [[1.0, 0.0], [0.0, 1.0 / 6.0]], rtol=1e-6)
    assert losses.cells_of({}, jnp.zeros((1, 2, 2, 4))) is None
    half = losses.cells_of(batch | {"loss_weight": jnp.array([0.5])}, jnp.zeros((1, 2, 2, 4)))
    np.testing.assert_allclose(half, 0.5 * found)
    with pytest.raises(ValueError, match=r"the loss mask has the shape \(1, 4, 6, 1\)"):
        losses.cells_of(batch, jnp.zeros((1, 3, 2, 4)))
