"""Guidance: the formula, the order of the doubled batch, one trace for every scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import guidance

X = jnp.arange(24.0).reshape(2, 3, 4, 1)
T = jnp.array([3, 7], jnp.int32)
COND = {"vector": jnp.array([[1.0], [2.0]]), "crossattn": jnp.ones((2, 5, 3))}
NULL = {"vector": jnp.array([[-1.0], [-5.0]]), "crossattn": jnp.zeros((2, 5, 3))}


def apply(x, t, conditioning):
    shift = conditioning["vector"][:, 0] * 10 + conditioning["crossattn"].sum(axis=(1, 2))
    return x * t[:, None, None, None] + shift[:, None, None, None]


def test_identity_passes_its_conditioning():
    got = guidance.identity(apply, COND)(X, T)
    np.testing.assert_array_equal(got, apply(X, T, COND))


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_cfg_is_u_plus_scale_times_the_difference(scale):
    got = guidance.cfg(apply, COND, NULL, scale)(X, T)
    out_u, out_c = apply(X, T, NULL), apply(X, T, COND)
    np.testing.assert_allclose(got, out_u + scale * (out_c - out_u), rtol=1e-6)


def test_one_scale_for_each_sample():
    got = guidance.cfg(apply, COND, NULL, jnp.array([0.0, 1.0]))(X, T)
    np.testing.assert_allclose(got[0], apply(X, T, NULL)[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], apply(X, T, COND)[1], rtol=1e-6)


def test_the_doubled_batch_is_unconditional_first():
    seen = {}

    def spy(x, t, conditioning):
        seen.update(x=x, t=t, **conditioning)
        return x

    guidance.cfg(spy, COND, NULL, 2.0)(X, T)
    np.testing.assert_array_equal(seen["x"], np.concatenate([X, X]))
    np.testing.assert_array_equal(seen["t"], [3, 7, 3, 7])
    np.testing.assert_array_equal(seen["vector"][:, 0], [-1, -5, 1, 2])


def test_another_scale_does_not_retrace():
    traces = []

    @jax.jit
    def run(scale):
        traces.append(None)
        return guidance.cfg(apply, COND, NULL, scale)(X, T)

    assert not np.allclose(run(jnp.float32(1.5)), run(jnp.float32(4.0)))
    assert len(traces) == 1


def test_half_precision_outputs_are_combined_in_float32():
    half = lambda x, t, c: apply(x, t, c).astype(jnp.bfloat16)
    got = guidance.cfg(half, COND, NULL, 3.0)(X, T)
    out_u, out_c = (np.asarray(half(X, T, c), np.float32) for c in (NULL, COND))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, out_u + 3.0 * (out_c - out_u), rtol=1e-6)


def test_conditionings_must_agree():
    with pytest.raises(
        ValueError, match=r"unconditional has \['vector'\].*\['crossattn', 'vector'\]"
    ):
        guidance.cfg(apply, COND, {"vector": NULL["vector"]}, 2.0)
    short = NULL | {"crossattn": jnp.zeros((2, 4, 3))}
    with pytest.raises(ValueError, match=r"unconditional\['crossattn'\] has the shape \(2, 4, 3\)"):
        guidance.cfg(apply, COND, short, 2.0)


@pytest.mark.parametrize("levels", ["timesteps", "sigmas"])
def test_the_interval_guides_only_inside(levels):
    """Both ends belong to it; the level is whatever predict gets."""
    t = jnp.array([2, 3, 7, 8]) if levels == "timesteps" else jnp.array([0.2, 0.3, 0.7, 0.8])
    interval = (3.0, 7.0) if levels == "timesteps" else (0.3, 0.7)
    x = jnp.ones((4, 3, 1))
    cond, null = {"vector": jnp.full((4, 1), 2.0)}, {"vector": jnp.full((4, 1), -1.0)}
    network = lambda x, t, c: x + c["vector"][:, :, None]
    got = guidance.cfg(network, cond, null, 5.0, interval=interval)(x, t)[:, 0, 0]
    np.testing.assert_allclose(got, [3.0, 15.0, 15.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("scale_schedule", "want"),
    [
        ("constant", [1, 5, 5, 5, 5, 1]),
        ("linear", [1, 1, 2, 3, 5, 1]),
        ("cosine", [1, 1, 3 - 2 * np.cos(np.pi / 4), 3, 5, 1]),
    ],
)
def test_the_scale_grows_through_the_interval(scale_schedule, want):
    """With u = 0 and c = 1 the output is the scale itself."""
    level = jnp.array([9.0, 8.0, 6.5, 5.0, 2.0, 1.9])
    cond, null = {"vector": jnp.ones((6, 1))}, {"vector": jnp.zeros((6, 1))}
    options = {"interval": (2.0, 8.0), "scale_schedule": scale_schedule}

    @jax.jit
    def run(scale):
        network = lambda x, t, c: c["vector"]
        return guidance.cfg(network, cond, null, scale, **options)(jnp.ones((6, 1)), level)

    np.testing.assert_allclose(run(jnp.float32(5.0))[:, 0], want, rtol=1e-5)
    # One scale for each sample, too.
    np.testing.assert_allclose(run(jnp.full(6, 5.0))[:, 0], want, rtol=1e-5)
    np.testing.assert_allclose(run(jnp.full(6, 1.0))[:, 0], 1.0, rtol=1e-6)


def test_rescaled_guidance_has_the_deviation_of_the_conditional():
    rng = np.random.default_rng(0)
    noise = {name: jnp.asarray(rng.normal(size=(2, 3, 4, 1)), jnp.float32) for name in "uc"}
    network = lambda x, t, c: c["concat"]
    cond, null = {"concat": noise["c"]}, {"concat": noise["u"]}

    def guide(**options):
        return np.asarray(guidance.cfg(network, cond, null, 8.0, **options)(X, T))

    plain, full, half = guide(), guide(rescale=1.0), guide(rescale=0.5)
    for i in range(2):
        std = np.std(np.asarray(noise["c"])[i])
        assert plain[i].std() > 3 * std
        np.testing.assert_allclose(full[i].std(), std, rtol=1e-5)
        # The direction stays.
        np.testing.assert_allclose(full[i] / std, plain[i] / plain[i].std(), rtol=1e-4)
    np.testing.assert_allclose(half, 0.5 * (plain + full), rtol=1e-5)
    np.testing.assert_array_equal(guidance.rescale_std(0 * X, 0 * X, 0.7), 0 * X)


def test_dynamic_thresholding_clips_at_the_percentile():
    """Sample 0 reaches to 11 and is divided; sample 1 lies within [-1, 1] and stays."""
    x = jnp.stack([jnp.linspace(-11.0, 9.0, 101), jnp.linspace(-1.0, 0.9, 101)])
    got = np.asarray(guidance.dynamic_threshold(x, 0.9))
    s = np.quantile(np.abs(np.asarray(x[0])), 0.9)
    assert 8.0 < s < 10.0
    np.testing.assert_allclose(got[0], np.clip(np.asarray(x[0]) / s, -1, 1), rtol=1e-5)
    np.testing.assert_array_equal(got[1], x[1])
    network = lambda x, t, c: x * c["vector"]
    both = {"vector": jnp.ones((2, 1))}
    guided = guidance.cfg(network, both, both, 3.0, dynamic_percentile=0.9)(x, T)
    np.testing.assert_allclose(guided, got, rtol=1e-5)


def test_norm_thresholding_bounds_the_root_mean_square():
    x = jnp.stack([jnp.full((3, 4), 10.0), jnp.full((3, 4), -0.2)])
    got = guidance.norm_threshold(x, 0.5)
    np.testing.assert_allclose(got, [np.full((3, 4), 0.5), np.full((3, 4), -0.2)], rtol=1e-6)
    network = lambda x, t, c: x * c["vector"][:, :, None]
    both = {"vector": jnp.ones((2, 1))}
    guided = guidance.cfg(network, both, both, 3.0, norm_limit=0.5)(x, T)
    np.testing.assert_allclose(guided, got, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (3.0, 2.0)}, r"interval = \(3.0, 2.0\) should be \(low, high\)"),
        ({"scale_schedule": "linear"}, "'linear' needs an interval of finite levels"),
        (
            {"scale_schedule": "cosine", "interval": (0.0, float("inf"))},
            "'cosine' needs an interval of finite levels",
        ),
        ({"rescale": 1.5}, r"rescale = 1.5 should lie in \[0, 1\]"),
        ({"dynamic_percentile": 0.0}, r"dynamic_percentile = 0.0 should lie in \(0, 1\]"),
        ({"norm_limit": 0.0}, "norm_limit = 0.0 should be positive"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        guidance.cfg(apply, COND, NULL, 2.0, **options)


def test_a_weaker_model_is_led_away_from():
    """Two Gaussians with the same mean, the weaker one wider: the denoisers are known."""

    def denoise(std):
        def predict(x, sigma, conditioning=None):
            return 0.4 + std**2 / (std**2 + sigma[:, None, None, None] ** 2) * (x - 0.4)

        return predict

    sigma = jnp.array([0.5, 3.0])
    strong, weak = (denoise(std)(X, sigma) for std in (0.6, 0.9))
    for scale in (1.0, 2.5, jnp.array([1.0, 2.5])):
        guided = guidance.against(denoise(0.6), COND, denoise(0.9), scale)(X, sigma)
        each = np.reshape(scale, (-1, 1, 1, 1))
        np.testing.assert_allclose(
            guided, each * strong + (1.0 - each) * weak, rtol=1e-4, atol=1e-5
        )
    inside = guidance.against(denoise(0.6), COND, denoise(0.9), 2.5, interval=(1.0, 9.0))(X, sigma)
    np.testing.assert_allclose(inside[0], strong[0], rtol=1e-5)
    assert np.abs(inside[1] - strong[1]).max() > 0.1
    with pytest.raises(ValueError, match="interval = "):
        guidance.against(denoise(0.6), COND, denoise(0.9), 2.0, interval=(3.0, 1.0))


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfgpp_steps_from_the_guided_image_in_the_unconditional_direction(scale):
    """Against the step of the paper, written out, at three pairs of levels."""
    x = np.linspace(-2.0, 2.0, 24, dtype=np.float64).reshape(2, 3, 4, 1)

    def denoise(x, sigma, conditioning):
        share = 0.36 / (0.36 + sigma.reshape(-1, 1, 1, 1) ** 2)
        mean = conditioning["mean"].reshape(-1, 1, 1, 1)
        return mean + share * (x - mean)

    means = {"mean": np.array([1.0, 2.0])}, {"mean": np.array([-1.0, 0.5])}
    now, after = np.array([9.0, 2.0, 0.5]), np.array([2.0, 1.9, 0.0])
    scales = guidance.cfgpp_scales(np.asarray(scale, np.float32), after / now)
    for sigma, sigma_next, own in zip(now, after, scales, strict=True):
        level = np.full(2, sigma)
        with_, without = (denoise(x, level, mean) for mean in means)
        image = without + scale * (with_ - without)
        expected = image + sigma_next / sigma * (x - without)
        arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (means, x, level))
        (yes, no), x32, level32 = arrays
        found = guidance.cfgpp(denoise, yes, no, float(own))(x32, level32)
        step = found + sigma_next / sigma * (x32 - found)
        np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [-0.1, 7.5])
def test_cfgpp_has_scales_from_0_to_1(scale):
    with pytest.raises(ValueError, match="should be between 0 and 1 for cfgpp"):
        guidance.cfgpp_scales(np.asarray(scale, np.float32), np.array([0.5]))


@pytest.mark.parametrize(("scale", "image_scale"), [(7.5, 1.5), (1.0, 1.0), (0.0, 2.0), (3.0, 0.0)])
def test_an_image_and_a_text_guide_with_a_scale_each(scale, image_scale):
    image_only = {"vector": jnp.array([[4.0], [3.0]]), "crossattn": jnp.zeros((2, 5, 3))}
    got = guidance.instruct_pix2pix(
        apply, COND, NULL, scale, image_only=image_only, image_scale=image_scale
    )(X, T)
    out_u, out_i, out_c = (apply(X, T, c) for c in (NULL, image_only, COND))
    want = out_u + image_scale * (out_i - out_u) + scale * (out_c - out_i)
    np.testing.assert_allclose(got, want, rtol=1e-5)
