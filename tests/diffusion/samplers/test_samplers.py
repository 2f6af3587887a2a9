"""The one door to every sampler, open in a fresh process whatever is imported first."""

import subprocess
import sys

import pytest

from diffusion_jax.diffusion import samplers

FACTORIES = (
    "consistency ddim ddim_inversion ddpm_ancestral deis dpm_solver dpmpp_2m dpmpp_2m_sde "
    "dpmpp_2s_ancestral dpmpp_3m_sde dpmpp_sde euler euler_ancestral euler_inversion heun lcm lms "
    "mean_flow plms restart tcd unipc"
).split()
LOOP = (
    "Sampler Samples initial_noise inpaint inverse sample segment start_from_image "
    "start_from_noise steps_of_strength visited_timesteps"
).split()


@pytest.mark.parametrize("first", ["samplers", "ddpm", "samplers.by_timestep"])
def test_no_circle_whatever_is_imported_first(first):
    code = (
        f"import diffusion_jax.diffusion.{first}\n"
        "from diffusion_jax.diffusion import samplers\n"
        "print(samplers.ddim.__module__, samplers.sigmas.karras(1).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "diffusion_jax.diffusion.samplers.by_timestep"


def test_every_factory_and_the_loop_are_here():
    for name in (*FACTORIES, *LOOP):
        assert callable(getattr(samplers, name)), name
        assert name in dir(samplers)
    with pytest.raises(AttributeError, match="has no attribute 'dimm'"):
        _ = samplers.dimm
