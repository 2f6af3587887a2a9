"""The one sample_fn: every sampler reaches the data, from noise, from an image, and in parts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.devices.mesh import make_mesh
from diffusion_jax.diffusion.samplers.by_level import ancestral_levels
from diffusion_jax.diffusion.samplers.sigmas import from_schedule
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.noise import build_noise
from diffusion_jax.experiment.sampling import LEVEL_SAMPLERS, TIMESTEP_SAMPLERS, build_sample_fn
from diffusion_jax.models.conditioning.embedders import class_embedding, class_label

SCHEDULE = dict(name="linear", linear_start=0.00085, linear_end=0.012, num_timesteps=1000)
EDM = dict(name="continuous", scaling=dict(name="edm"))
MESH = make_mesh(devices=jax.devices()[:1])
SIZE = (4, 4, 1)


class Constant(Network):
    """The exact network of data that is one image per class: label / 10 everywhere.

    It predicts eps from the timestep, or F of EDM's scaling from ln(sigma) / 4.
    """

    def apply(self, params, x, t, conditioning, dropout_key=None):
        image = jnp.broadcast_to(conditioning["vector"][:, None, None, None] / 10.0, x.shape)
        if jnp.issubdtype(t.dtype, jnp.integer):
            abar = params["alphas_cumprod"][t][:, None, None, None]
            return (x - jnp.sqrt(abar) * image) / jnp.sqrt(1.0 - abar)
        sigma = jnp.exp(4.0 * t)[:, None, None, None]
        root = jnp.sqrt(sigma**2 + 0.25)
        return (image - 0.25 / root * x) / (sigma * 0.5 / root)  # c_in x = x / root

    def size_multiple(self):
        return 1


NETWORK = Constant(
    types.SimpleNamespace(embeds_duration=True),
    {"label": class_label(num_classes=9, ucg_rate=0.1)},
    "adm",
    SIZE,
)
LABELS = np.arange(4, dtype=np.int32)


def make(sampler, denoiser=None, guidance=None, network=NETWORK):
    noise = build_noise(SCHEDULE, denoiser, None)
    guidance = dict(name="none") if guidance is None else guidance
    sample_fn, _, _ = build_sample_fn(network, noise, sampler, guidance, MESH)
    params = {"alphas_cumprod": noise.schedule.alphas_cumprod, "conditioner": {}}
    frozen = noise.constants() | {"conditioner": {}, "first_stage": {}}
    keys = jax.random.split(jax.random.key(0), 4)

    def draw(**options):
        options = {"num_steps": 10} | options
        return np.asarray(sample_fn(params, frozen, {"label": LABELS}, keys, **options).x)

    return draw


@pytest.mark.parametrize("name", [*TIMESTEP_SAMPLERS, *LEVEL_SAMPLERS])
def test_every_sampler_draws_the_image_of_its_class(name):
    x = make(dict(name=name))()
    # Samplers that stop at timestep 0 leave its noise, 0.03.
    tolerance = 0.15 if name in ("ddim", "plms", "dpm_solver", "tcd") else 1e-3
    np.testing.assert_allclose(x, np.broadcast_to(LABELS[:, None, None, None] / 10, x.shape),
                               atol=tolerance)  # fmt: skip


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_a_continuous_denoiser_is_sampled_on_edms_grid(name):
    x = make(dict(name=name), EDM)()
    np.testing.assert_allclose(x, np.broadcast_to(LABELS[:, None, None, None] / 10, x.shape),
                               atol=1e-3)  # fmt: skip


def test_guidance_extrapolates_away_from_the_null_class():
    draw = make(dict(name="euler"), guidance=dict(name="cfg", scale=3.0))
    # Conditional label / 10, null class 9 / 10: 0.9 + 3 (label / 10 - 0.9).
    expected = 0.9 + 3.0 * (LABELS / 10 - 0.9)
    np.testing.assert_allclose(draw()[:, 0, 0, 0], expected, atol=1e-3)
    np.testing.assert_allclose(draw(guidance_scale=1.0)[:, 0, 0, 0], LABELS / 10, atol=1e-3)
    negative = {"label": np.full(4, 5, np.int32)}
    expected = 0.5 + 3.0 * (LABELS / 10 - 0.5)
    np.testing.assert_allclose(draw(negative=negative)[:, 0, 0, 0], expected, atol=1e-3)


def test_two_parts_make_the_whole():
    for name in ("euler", "ddim", "euler_ancestral"):
        draw = make(dict(name=name))
        first = draw(steps=(0, 6), decode=False)
        assert np.abs(first - draw()).max() > 0.05
        np.testing.assert_allclose(draw(steps=(6, 10), latents=first), draw(), atol=1e-5)


class Silent(Constant):
    """A network that predicts no noise at all: x is the image, and Euler's steps leave it alone."""

    def apply(self, params, x, t, conditioning, dropout_key=None):
        return jnp.zeros_like(x)


class Gaussian(Constant):
    """The exact network of pixels N(label / 10, 0.3^2): eps from the timestep."""

    def apply(self, params, x, t, conditioning, dropout_key=None):
        mean = conditioning["vector"][:, None, None, None] / 10.0
        abar = params["alphas_cumprod"][t][:, None, None, None]
        return jnp.sqrt(1.0 - abar) * (x - jnp.sqrt(abar) * mean) / (abar * 0.09 + 1.0 - abar)


def unit_noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_strength_and_a_mask_begin_with_the_image_everywhere():
    """And not with noise alone: the redrawn half is the image under noise of the first step."""
    draw = make(dict(name="euler"), network=Silent(*NETWORK))
    mask = np.zeros((4, 4, 4, 1), np.float32)
    mask[:, :2] = 1.0
    image, noise = np.full((4, *SIZE), 0.7, np.float32), unit_noise(4, *SIZE)
    sigma = from_schedule(make_schedule(**SCHEDULE), 10)[7]  # strength 0.4 takes the last 3 of 10
    x = draw(image=image, mask=mask, strength=0.4, noise=noise)
    np.testing.assert_allclose(x[:, 2:], 0.7 + sigma * noise[:, 2:], rtol=1e-4, atol=1e-5)
    alone = draw(image=image, mask=mask, noise=noise)
    assert np.abs(alone[:, 2:]).max() > 10  # without strength it is noise alone


@pytest.mark.parametrize("name", ["euler_ancestral", "euler"])
def test_noise_and_a_scale_for_each_step_can_be_given(name):
    """Followed in float64: D is what guidance makes of two images, one for each condition."""
    scales = np.linspace(1.0, 3.0, 10)
    sigmas, noise = from_schedule(make_schedule(**SCHEDULE), 10), unit_noise(4, 11, *SIZE)
    labels = LABELS[:, None, None, None] / 10
    x = np.sqrt(1 + sigmas[0] ** 2) * noise[:, 0]
    for i, scale in enumerate(scales):
        down, up = sigmas[i + 1], 0.0
        if name == "euler_ancestral":
            down, up = ancestral_levels(sigmas[i], sigmas[i + 1], 1.0)
        ratio = down / sigmas[i]
        x = ratio * x + (1 - ratio) * (0.9 + scale * (labels - 0.9)) + up * noise[:, i + 1]
        if i == 5:
            half = x
    draw = make(dict(name=name))
    given = dict(guidance_scale=scales, noise=noise[:, 0], step_noise=noise[:, 1:])
    np.testing.assert_allclose(draw(**given), x, atol=1e-3)
    first = draw(steps=(0, 6), decode=False, **given)
    np.testing.assert_allclose(first, half, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(draw(steps=(6, 10), latents=first, **given), x, atol=1e-3)
    # A constant scale is the same, in one number or many.
    many, one = (draw(guidance_scale=scale) for scale in ([2.0] * 10, 2.0))
    np.testing.assert_allclose(many, one, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"guidance_scale has the shape \(3,\); it should be one n"
    ):
        draw(guidance_scale=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("name", "steps", "iterations", "tolerance"),
    [
        ("ddim", 10, 20, 1e-4),
        ("euler", 10, 20, 1e-4),
        ("plms", 50, 3, 0.12),
        ("heun", 50, 3, 0.12),
        ("dpmpp_2m", 50, 3, 0.12),
    ],
)
def test_an_image_is_inverted_into_the_noise_that_draws_it(name, steps, iterations, tolerance):
    """With guidance too, whose scale grows: the way back takes the scales in reverse."""
    draw = make(dict(name=name), network=Gaussian(*NETWORK))
    image = LABELS[:, None, None, None] / 10 + 0.3 * unit_noise(4, *SIZE)
    options = dict(num_steps=steps, guidance_scale=np.linspace(1.0, 2.0, steps))
    x = draw(image=image, invert=iterations, **options)
    np.testing.assert_allclose(draw(latents=x, **options), image, atol=tolerance)
    assert np.abs(draw(latents=x, num_steps=steps, guidance_scale=1.0) - image).max() > 0.2
    part = draw(image=image, invert=iterations, steps=(4, steps), **options)
    back = draw(latents=part, steps=(4, steps), **options)
    np.testing.assert_allclose(back, image, atol=tolerance)
    # Without guidance x is the image's noise, to the discretization of a first-order method.
    x = draw(image=image, invert=iterations, num_steps=50)
    level = 1.0 if name in TIMESTEP_SAMPLERS else 14.6146
    noise = (image - LABELS[:, None, None, None] / 10) / 0.3
    np.testing.assert_allclose(x / level, noise, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_a_sampler_that_draws_noise_is_not_inverted(name):
    image = np.zeros((4, *SIZE), np.float32)
    with pytest.raises(ValueError, match="the sampler draws noise in every step.*ddim with eta"):
        make(dict(name=name))(image=image, invert=1)


def test_an_image_is_where_sampling_begins_and_a_mask_keeps_it():
    draw = make(dict(name="euler", num_steps=50))
    image = np.full((4, *SIZE), 0.7, np.float32)
    weak = draw(image=image, strength=0.3, steps=None, num_steps=50, decode=False)
    np.testing.assert_allclose(weak[:, 0, 0, 0], LABELS / 10, atol=1e-3)
    stopped = make(dict(name="ddim"))(image=image, strength=0.2)
    assert np.all(np.isfinite(stopped))
    mask = np.zeros((4, 4, 4, 1), np.float32)
    mask[:, :2] = 1.0
    kept = draw(image=image, mask=mask, num_steps=50)
    # Before the last step the kept half is the image under that step's noise.
    np.testing.assert_allclose(kept[:, 3, 0, 0], LABELS / 10, atol=1e-3)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (dict(name="dpmpp_sde"), 19),
        (dict(name="restart", restart_steps=3), 13),
        (dict(name="ddim", discretize="uniform_ldm"), 10),
    ],
)
def test_a_sampler_may_take_more_steps_than_levels(sampler, steps):
    """And a scale and noise for each of them; two parts still make the whole."""
    draw = make(sampler)
    noise = dict(noise=unit_noise(4, *SIZE), step_noise=unit_noise(4, steps, *SIZE, seed=1))
    whole = draw(guidance_scale=[2.0] * steps, **noise)
    np.testing.assert_allclose(draw(guidance_scale=2.0, **noise), whole, atol=1e-4)
    first = draw(steps=(0, 6), decode=False, guidance_scale=2.0, **noise)
    rest = draw(steps=(6, steps), latents=first, guidance_scale=2.0, **noise)
    np.testing.assert_allclose(rest, whole, atol=1e-4)
    with pytest.raises(ValueError, match=f"it should be one number or {steps}"):
        draw(guidance_scale=[2.0] * (steps + 1))
    image = np.full((4, *SIZE), 0.7, np.float32)
    assert np.all(np.isfinite(draw(image=image, strength=0.5)))


@pytest.mark.parametrize(
    "scale", ["3", None, [None], [[1.0]], 1 + 2j, float("inf"), [1.0, float("nan")]]
)
def test_what_is_no_guidance_scale_is_one_sentence(scale):
    draw = make(dict(name="euler"))
    scale = np.array(scale) if scale is None else scale  # None alone is the config's
    with pytest.raises(ValueError, match="guidance_scale .*(should be|has the shape)"):
        draw(guidance_scale=scale)
    with pytest.raises(ValueError, match="guidance_scale is traced by JAX"):
        jax.jit(lambda scale: draw(guidance_scale=scale))(2.0)


def test_another_size_than_the_datas():
    assert make(dict(name="euler"))(size=(8, 6)).shape == (4, 8, 6, 1)


@pytest.mark.parametrize(
    ("sampler", "denoiser", "guidance", "message"),
    [
        (dict(name="ddim"), EDM, None, "visits the schedule's timesteps.*choose from euler"),
        (dict(name="eulr"), None, None, "'eulr' is unknown; did you mean 'euler'"),
        (
            dict(name="DPM++ 2M Karras"),
            None,
            None,
            r"config\.sampler\.name = 'DPM\+\+ 2M Karras' is unknown; here it is "
            "--config.sampler.name=dpmpp_2m --config.discretization.name=karras",
        ),
        (dict(name="euler", eta=1.0), None, None, r"config\.sampler\.eta = 1\.0 is not an option"),
        (dict(name="euler", num_steps=0), None, None, r"config\.sampler\.num_steps = 0 should be"),
        (dict(name="euler", num_steps=1.5), None, None, r"num_steps = 1\.5 should be int"),
        (
            dict(name="ddim"),
            None,
            dict(name="cfg", scale=2.0, dynamic_percentile=0.99),
            r"config\.guidance\.dynamic_percentile = 0\.99 works on predicted images",
        ),
        (
            dict(name="euler"),
            None,
            dict(name="cfg", scale=2.0, rescales=0.7),
            r"config\.guidance\.rescales = 0\.7 is not an option; did you mean 'rescale'",
        ),
        (dict(name="euler"), None, dict(name="cfg"), r"config\.guidance\.scale is missing"),
        (
            dict(name="euler"),
            None,
            dict(name="embedded", scale=8.0),
            "'embedded' should be 'embedded' with, and only with, a network that reads the scale",
        ),
    ],
)
def test_mistakes_are_told(sampler, denoiser, guidance, message):
    with pytest.raises(ConfigError, match=message):
        make(sampler, denoiser, guidance)


class Scaled(Constant):
    """A network that draws the scale of guidance that it is told, 1 where it is told none."""

    def apply(self, params, x, t, conditioning, dropout_key=None):
        scale = conditioning["guidance"] if "guidance" in conditioning else jnp.ones(len(x))
        return super().apply(params, x, t, {"vector": 10.0 * scale})


def test_a_network_that_reads_the_scale_is_told_it():
    network = Scaled(types.SimpleNamespace(time_cond_proj_dim=8), *NETWORK[1:])
    draw = make(dict(name="lcm"), None, dict(name="embedded", scale=0.5), network)
    np.testing.assert_allclose(draw(num_steps=4), 0.5, atol=1e-3)
    np.testing.assert_allclose(draw(num_steps=2, guidance_scale=[0.5, 0.25]), 0.25, atol=1e-3)
    np.testing.assert_allclose(draw(num_steps=4, guidance_scale=1.0), 1.0, atol=1e-3)
    with pytest.raises(ConfigError, match="name = 'cfg' should be 'embedded' with, and only with"):
        make(dict(name="lcm"), None, dict(name="cfg", scale=2.0), network)


class Stretched(Constant):
    """A network of mean velocities whose image is the length of its step in t, from 0 to 1."""

    def apply(self, params, x, t, conditioning, dropout_key=None):
        t = t[:, None, None, None] / 1000.0
        length = conditioning["duration"] / 1000.0 * conditioning["vector"]
        return (x - length[:, None, None, None]) / t


def test_a_network_of_mean_velocities_is_told_how_long_a_step_is():
    sampler, flow = dict(name="mean_flow"), dict(name="continuous", scaling=dict(name="flow"))
    network = Stretched(NETWORK.module, *NETWORK[1:])
    draw = make(sampler, flow, dict(name="cfg", scale=2.0), network)
    for steps in (1, 4):  # the last step alone decides
        plain, guided = (draw(num_steps=steps, guidance_scale=scale) for scale in (1.0, 2.0))
        np.testing.assert_allclose(plain[:, 0, 0, 0], LABELS / steps, atol=1e-5)
        np.testing.assert_allclose(guided[:, 0, 0, 0], (2.0 * LABELS - 9) / steps, atol=1e-5)
    scales = draw(num_steps=4, guidance_scale=[1.0, 1.0, 1.0, 2.0])
    np.testing.assert_allclose(scales, guided, atol=1e-5)
    with pytest.raises(ConfigError, match="'mean_flow' needs a network that was trained with"):
        make(sampler, flow, None, Stretched(None, *NETWORK[1:]))


def test_guidance_needs_dropped_conditions():
    network = NETWORK._replace(embedders={"label": class_embedding(num_classes=3, embed_dim=2)})
    with pytest.raises(ConfigError, match="scale = 2.0 needs an embedder with ucg_rate > 0"):
        make(dict(name="euler"), guidance=dict(name="cfg", scale=2.0), network=network)
    draw = make(dict(name="euler"))
    with pytest.raises(ValueError, match="guidance_scale = nan should be finite"):
        draw(guidance_scale=float("nan"))
