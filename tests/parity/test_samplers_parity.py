"""Whole runs of our samplers against diffusers' schedulers, with one fake network and one noise."""

import importlib
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import preconditioning, samplers
from diffusion_jax.diffusion import samplers as ss
from diffusion_jax.diffusion.samplers import driver, sigmas
from diffusion_jax.diffusion.schedule import make_schedule

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

START, END = 0.00085, 0.012
OPTIONS = {"beta_schedule": "scaled_linear", "beta_start": START, "beta_end": END}
SHAPE = (3, 4, 2, 1)
# For x_T, and for each of the 12 steps.
NOISE = np.random.default_rng(0).standard_normal((13, *SHAPE), np.float32)
INITIAL, STEP_NOISE = NOISE[0], NOISE[1:]


def network(x, level, xp):
    """Predict some noise from x of unit variance; no step of a sampler is exact for it."""
    return 0.6 * xp.tanh(x) + 0.1 * xp.sin(3.0 * x + level)


def denoiser(x, sigma):
    sigma = sigma[:, None, None, None]
    return x - sigma * network(x / jnp.sqrt(sigma**2 + 1), 0.2 * jnp.log(sigma), jnp)


def compare(sampler, predict, x, want):
    keys = jax.random.split(jax.random.key(0), SHAPE[0])
    noise = jnp.asarray(STEP_NOISE[: sampler.num_steps]) if sampler.stochastic else None
    run = jax.jit(lambda x, noise: driver.sample(sampler, predict, x, keys, step_noise=noise))
    got = run(jnp.asarray(x), noise)
    np.testing.assert_allclose(got.x, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


class Theirs:
    """Run a scheduler of diffusers in x = x_0 + sigma eps, with the noise of our driver."""

    def __init__(self, name, num_steps, monkeypatch, spacing="linspace", **options):
        cls = getattr(diffusers, name)
        self.scheduler = cls(timestep_spacing=spacing, **OPTIONS, **options)
        self.scheduler.set_timesteps(num_steps)
        self.step = 0
        module = __import__(cls.__module__, fromlist=["randn_tensor"])
        if hasattr(module, "randn_tensor"):
            draw = lambda *args, **kwargs: torch.tensor(STEP_NOISE[self.step])
            monkeypatch.setattr(module, "randn_tensor", draw)
        evaluated = self.scheduler.sigmas.double().numpy()
        self.evaluations = evaluated[:-1]
        self.sigmas = np.append(-np.unique(-evaluated[:-1]), 0.0)
        assert len(self.sigmas) == num_steps + 1

    def run(self, x, in_vp=False, count=None, **options):
        x = torch.tensor(x)
        if in_vp:
            x = x / np.sqrt(1 + self.sigmas[0] ** 2)
        for i, t in enumerate(self.scheduler.timesteps[:count]):
            sigma = float(self.evaluations[i])
            self.step = int(np.searchsorted(-self.sigmas, -sigma))
            inputs = x if in_vp else self.scheduler.scale_model_input(x, t)
            output = network(inputs, 0.2 * np.log(sigma), torch)
            x = self.scheduler.step(output, t, x, **options).prev_sample
        if in_vp and count is not None:
            x = x * np.sqrt(1 + self.sigmas[count] ** 2)
        return x.numpy()


def x_T(sigma):
    return (INITIAL * np.sqrt(1 + sigma**2)).astype(np.float32)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (ss.euler, "EulerDiscreteScheduler"),
        (ss.heun, "HeunDiscreteScheduler"),
        (ss.lms, "LMSDiscreteScheduler"),
    ],
)
def test_deterministic_samplers(make, name, karras, monkeypatch):
    theirs = Theirs(name, 12, monkeypatch, use_karras_sigmas=karras)
    x = x_T(theirs.sigmas[0])
    want = theirs.run(x)
    compare(make(theirs.sigmas), denoiser, x, want)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms_of_lower_orders(order, monkeypatch):
    theirs = Theirs("LMSDiscreteScheduler", 12, monkeypatch)
    x = x_T(theirs.sigmas[0])
    want = theirs.run(x, order=order)
    compare(ss.lms(theirs.sigmas, order=order), denoiser, x, want)


def test_euler_with_churn(monkeypatch):
    """diffusers predicts before it churns, from the x and the level without the new noise: both
    agree for a network that always predicts the same image."""
    options = {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 9.0, "s_noise": 1.01}
    theirs = Theirs("EulerDiscreteScheduler", 12, monkeypatch, prediction_type="sample")
    x = x_T(theirs.sigmas[0])
    out, image = torch.tensor(x), torch.full(SHAPE, 0.3)
    for i, t in enumerate(theirs.scheduler.timesteps[:-2]):
        theirs.step = i
        theirs.scheduler.scale_model_input(out, t)
        out = theirs.scheduler.step(image, t, out, **options).prev_sample
    sampler = ss.euler(theirs.sigmas, **options)
    assert 3 <= int((sampler.coefficients.churn > 0).sum()) < 11
    part = driver.segment(sampler, 0, 10)
    compare(part, lambda x, sigma: 0.0 * x + 0.3, x, out.numpy())


def test_euler_ancestral(monkeypatch):
    theirs = Theirs("EulerAncestralDiscreteScheduler", 12, monkeypatch)
    x = x_T(theirs.sigmas[0])
    want = theirs.run(x)
    compare(ss.euler_ancestral(theirs.sigmas), denoiser, x, want)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ss.dpmpp_2m, {"algorithm_type": "dpmsolver++"}),
        (ss.dpmpp_2m_sde, {"algorithm_type": "sde-dpmsolver++"}),
        (
            partial(ss.dpmpp_2m_sde, solver_type="heun"),
            {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        ),
        (
            partial(ss.dpmpp_2m_sde, solver_type="heun", eta=0.0),
            {"algorithm_type": "dpmsolver++", "solver_type": "heun"},
        ),
    ],
)
def test_dpm_solver_pp_of_order_two(make, options, karras, monkeypatch):
    options = {"solver_order": 2, "use_karras_sigmas": karras, **options}
    theirs = Theirs("DPMSolverMultistepScheduler", 12, monkeypatch, **options)
    x = x_T(theirs.sigmas[0])
    want = theirs.run(x, in_vp=True)
    compare(make(theirs.sigmas), denoiser, x, want)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, karras, monkeypatch):
    options = {"solver_order": order, "use_karras_sigmas": karras}
    theirs = Theirs("UniPCMultistepScheduler", 12, monkeypatch, **options)
    x = x_T(theirs.sigmas[0])
    want = theirs.run(x, in_vp=True)
    compare(ss.unipc(theirs.sigmas, order=order), denoiser, x, want)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order, monkeypatch):
    """All steps but the last one, which there ends at the level of timestep 0."""
    theirs = Theirs("DEISMultistepScheduler", 12, monkeypatch, solver_order=order)
    x = x_T(theirs.sigmas[0])
    want = theirs.run(x, in_vp=True, count=11)
    compare(driver.segment(ss.deis(theirs.sigmas, order=order), 0, 11), denoiser, x, want)


def test_dpmpp_sde(monkeypatch):
    """The noise of whole steps is given to diffusers as ours joins it from both halves."""
    try:
        import torchsde  # noqa: F401
    except ImportError:  # only its noise needs it, which is replaced
        monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    theirs = module.DPMSolverSDEScheduler(use_karras_sigmas=True, **OPTIONS)
    theirs.set_timesteps(6)
    sigmas = np.append(-np.unique(-theirs.sigmas[:-1].double().numpy()), 0.0)
    sampler = ss.dpmpp_sde(sigmas)
    x, step = x_T(sigmas[0]), 0

    def noise(sigma_from, sigma_to):
        if step % 2 == 0:
            return torch.tensor(STEP_NOISE[step])
        middle = np.sqrt(sigma_from * sigma_to)
        ours = (sigma_from - middle) / (sigma_from - sigma_to)
        joined = np.sqrt(ours) * STEP_NOISE[step - 1] + np.sqrt(1 - ours) * STEP_NOISE[step]
        return torch.tensor(np.asarray(joined, np.float32))

    out = torch.tensor(x)
    theirs.noise_sampler = noise
    levels = np.asarray(sampler.coefficients.sigma)
    for step, t in enumerate(theirs.timesteps):  # noqa: B007, read by noise()
        output = network(theirs.scale_model_input(out, t), 0.2 * np.log(levels[step]), torch)
        out = theirs.step(output, t, out).prev_sample
    assert step == 10
    compare(sampler, denoiser, x, out.numpy())


def discrete(x, t, xp):
    return network(x, 0.004 * t, xp)


def predict(x, t):
    return discrete(x, t[:, None, None, None], jnp)


@pytest.mark.parametrize(
    ("num_steps", "original_steps", "prediction"),
    [(1, 50, "epsilon"), (4, 50, "epsilon"), (8, 50, "v_prediction"), (3, 20, "sample")],
)
@pytest.mark.parametrize(
    ("name", "options", "of_step"),
    [("lcm", {}, {}), ("lcm", {"timestep_scaling": 0.002}, {}), ("tcd", {"eta": 0.3}, {"eta": 0.3}),
     ("tcd", {"eta": 1.0}, {"eta": 1.0}), ("tcd", {"eta": 0.0}, {"eta": 0.0})],
)  # fmt: skip
def test_distilled_models(
    name, options, of_step, num_steps, original_steps, prediction, monkeypatch
):
    """The boundary scalings of LCM are seen with a small timestep_scaling."""
    shared = {k: v for k, v in options.items() if k not in of_step}
    theirs = getattr(diffusers, f"{name.upper()}Scheduler")(
        clip_sample=False,
        prediction_type=prediction,
        original_inference_steps=original_steps,
        **shared,
        **OPTIONS,
    )
    theirs.set_timesteps(num_steps)
    module, step = importlib.import_module(f"diffusers.schedulers.scheduling_{name}"), 0
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(STEP_NOISE[step]))
    x = x_T(0.0)
    out = torch.tensor(x)
    for step, t in enumerate(theirs.timesteps):  # noqa: B007, read by randn_tensor
        out = theirs.step(discrete(out, float(t), torch), t, out, **of_step).prev_sample
    parameterization = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[prediction]
    sampler = getattr(samplers, name)(
        make_schedule("linear", linear_start=START, linear_end=END),
        num_steps,
        original_steps=original_steps,
        parameterization=parameterization,
        **options,
    )
    np.testing.assert_array_equal(sampler.coefficients.t, theirs.timesteps)
    compare(sampler, predict, x, out.numpy())


@pytest.mark.parametrize("num_steps", [10, 50])
def test_plms(num_steps):
    """diffusers lists the second timestep twice, for the evaluation ahead."""
    theirs = diffusers.PNDMScheduler(
        skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, **OPTIONS
    )
    theirs.set_timesteps(num_steps)
    assert len(theirs.timesteps) == num_steps + 1
    x = x_T(0.0)
    out = torch.tensor(x)
    for t in theirs.timesteps:
        out = theirs.step(discrete(out, float(t), torch), int(t), out).prev_sample
    schedule = make_schedule("linear", linear_start=START, linear_end=END)
    compare(samplers.plms(schedule, num_steps), predict, x, out.numpy())


@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_inversion(num_steps):
    theirs = diffusers.DDIMInverseScheduler(
        set_alpha_to_one=False, steps_offset=1, clip_sample=False, **OPTIONS
    )
    theirs.set_timesteps(num_steps)
    schedule = make_schedule("linear", linear_start=START, linear_end=END)
    sampler = samplers.ddim_inversion(schedule, num_steps)
    np.testing.assert_array_equal(sampler.coefficients.t, theirs.timesteps)
    x = x_T(0.0)
    out = torch.tensor(x)
    for t in theirs.timesteps:
        out = theirs.step(discrete(out, float(t), torch), int(t), out).prev_sample
    compare(sampler, predict, x, out.numpy())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(shift):
    """Euler on the levels of `flow` against FlowMatchEulerDiscreteScheduler, given even times."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12))
    x = torch.tensor(INITIAL)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t / 500, torch), t, x).prev_sample

    grid = sigmas.flow(12, shift=shift)
    times = theirs.sigmas.double().numpy()
    np.testing.assert_allclose(grid / (1 + grid), times, atol=2e-7)

    def velocity(x, c_noise, conditioning):
        return network(x, c_noise[:, None, None, None] / 500, jnp)

    denoise = preconditioning.denoiser(velocity, preconditioning.flow())
    sampler = ss.euler(grid)
    x_T = driver.start_from_noise(sampler, jnp.asarray(INITIAL))
    compare(sampler, lambda x, sigma: denoise(x, sigma, {}), x_T, x.numpy())
