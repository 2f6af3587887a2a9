"""Schedules and single steps against diffusers' DDPMScheduler and DDIMScheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm, samplers
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule, respace

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# ours -> diffusers
BETAS = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
START, END = 0.00085, 0.012
SHAPE = (4, 5, 3, 2)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3)]


def in_float64(theirs, name):
    """Replace diffusers' float32 tables, whose 1 - abar has lost four digits where it is small."""
    betas = make_beta_schedule(name, linear_start=START, linear_end=END)
    np.testing.assert_allclose(theirs.betas, betas, rtol=1e-4)
    theirs.betas = torch.tensor(betas)
    theirs.alphas = 1 - theirs.betas
    theirs.alphas_cumprod = torch.cumprod(theirs.alphas, 0)
    if hasattr(theirs, "final_alpha_cumprod") and theirs.final_alpha_cumprod != 1.0:
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    return theirs


def schedules(name, **options):
    ours = make_schedule(name, linear_start=START, linear_end=END)
    theirs = {"beta_schedule": BETAS[name], "beta_start": START, "beta_end": END, **options}
    return ours, theirs


@pytest.mark.parametrize("name", BETAS)
def test_noise_schedule_and_v(name):
    ours, options = schedules(name)
    theirs = diffusers.DDPMScheduler(**options)
    # diffusers multiplies a thousand float32 numbers.
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-4)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-8)
    x_start, noise, _ = arrays()
    t = np.array([0, 1, 500, 999], np.int32)
    tensors = [torch.tensor(a) for a in (x_start, noise, t)]
    x_t = ddpm.q_sample(ours, jnp.asarray(x_start), jnp.asarray(t), jnp.asarray(noise))
    v = ddpm.get_v(ours, jnp.asarray(x_start), jnp.asarray(noise), jnp.asarray(t))
    np.testing.assert_allclose(x_t, theirs.add_noise(*tensors), atol=1e-5)
    np.testing.assert_allclose(v, theirs.get_velocity(*tensors), atol=1e-5)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("parameterization", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [1000, 50])
def test_ddpm_step(name, parameterization, variance, num_steps, monkeypatch):
    ours, options = schedules(
        name,
        prediction_type=PREDICTIONS[parameterization],
        variance_type=variance,
        clip_sample=True,
    )
    theirs = in_float64(diffusers.DDPMScheduler(timestep_spacing="leading", **options), name)
    theirs.set_timesteps(num_steps)
    sampler = samplers.ddpm_ancestral(
        ours,
        num_steps,
        discretize="leading",
        parameterization=parameterization,
        variance=variance,
    )
    for i in (0, num_steps // 2, num_steps - 2, num_steps - 1):
        t = int(theirs.timesteps[i])
        x, output, noise = arrays(seed=i)
        monkeypatch.setattr(
            diffusers.schedulers.scheduling_ddpm,
            "randn_tensor",
            lambda *args, noise=noise, **kwargs: torch.tensor(noise),
        )
        want = theirs.step(torch.tensor(output), t, torch.tensor(x))
        row = jax.tree.map(lambda values, i=i: values[i], sampler.coefficients)
        assert int(row.t) == t
        predict = lambda x, t, output=output: jnp.asarray(output)
        got, _, x_start = sampler.step(predict, jnp.asarray(x), (), row, jnp.asarray(noise))
        np.testing.assert_allclose(x_start, want.pred_original_sample, atol=1e-5)
        np.testing.assert_allclose(got, want.prev_sample, atol=1e-5)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("parameterization", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", ["no", "x0", "x0 and noise"])
def test_ddim_step(name, parameterization, eta, clip):
    """Steps from all over the run, with upstream's spacing (ours: uniform), which ends at t = 0."""
    ours, options = schedules(
        name, prediction_type=PREDICTIONS[parameterization], clip_sample=clip != "no"
    )
    theirs = diffusers.DDIMScheduler(set_alpha_to_one=False, steps_offset=1, **options)
    theirs = in_float64(theirs, name)
    theirs.set_timesteps(50)
    sampler = samplers.ddim(
        ours,
        50,
        eta=eta,
        parameterization=parameterization,
        clip_denoised=clip != "no",
        use_clipped_noise=clip == "x0 and noise",
    )
    compare_ddim(theirs, sampler, eta=eta, use_clipped_model_output=clip == "x0 and noise")


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [1000, 50, 8])
def test_ddim_spacings_that_end_clean(spacing, num_steps):
    ours, options = schedules("linear", clip_sample=False)
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=True, **options)
    theirs = in_float64(theirs, "linear")
    theirs.set_timesteps(num_steps)
    sampler = samplers.ddim(ours, num_steps, eta=0.3, discretize=spacing)
    compare_ddim(theirs, sampler, eta=0.3, use_clipped_model_output=False)


def compare_ddim(theirs, sampler, **options):
    np.testing.assert_array_equal(sampler.coefficients.t, theirs.timesteps)
    steps = range(0, sampler.num_steps, max(1, sampler.num_steps // 10))
    for i in sorted({*steps, sampler.num_steps - 1}):
        x, output, noise = arrays(seed=i)
        t = int(sampler.coefficients.t[i])
        want = theirs.step(
            torch.tensor(output),
            t,
            torch.tensor(x),
            variance_noise=torch.tensor(noise),
            **options,
        )
        row = jax.tree.map(lambda values, i=i: values[i], sampler.coefficients)
        predict = lambda x, t, output=output: jnp.asarray(output)
        got, _, x_start = sampler.step(predict, jnp.asarray(x), (), row, jnp.asarray(noise))
        scale = 1.0 + np.abs(np.asarray(want.pred_original_sample)).max()
        np.testing.assert_allclose(x_start, want.pred_original_sample, atol=2e-6 * scale)
        np.testing.assert_allclose(got, want.prev_sample, atol=2e-6 * scale)


def test_respaced_betas_are_those_of_diffusers():
    """beta of the step t -> t - 20, which diffusers computes inside step()."""
    ours, options = schedules("linear")
    theirs = in_float64(diffusers.DDPMScheduler(**options), "linear")
    theirs.set_timesteps(50)
    visited, _ = samplers.visited_timesteps(1000, 50, "leading")
    small = respace(ours, visited).posterior_variance
    want = [float(theirs._get_variance(int(t))) for t in visited]
    np.testing.assert_allclose(small[1:], want[1:], rtol=2e-5)
