"""The `sampler` and `guidance` sections -> the one sample_fn that Pipeline, image hook, evaluation and CLI call."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.build.binding import ConfigError, bind, pick
from diffusion_jax.build.network import Network
from diffusion_jax.diffusion import guidance, samplers
from diffusion_jax.sharding import batch_sharding, replicated
from diffusion_jax.types import Batch, Keys, Predict, PyTree

SAMPLERS = {"ddpm": samplers.ddpm_ancestral, "ddim": samplers.ddim}
GUIDERS = {"none": guidance.identity, "cfg": guidance.cfg}
# The build supplies these; a config that sets one is told so.
_GIVEN = ("schedule", "parameterization", "apply", "conditioning", "unconditional")

# (params, frozen, inputs, keys, *, num_steps, guidance_scale, log_every, inpaint) -> Samples
SampleFn = Callable[..., samplers.Samples]


def build_sample_fn(
    network: Network,
    sampler: Mapping[str, Any],
    guider: Mapping[str, Any],
    parameterization: str,
    mesh: Mesh,
) -> SampleFn:
    """Assemble the sample_fn of a config: inputs and keys [b] -> Samples, x float32 [b h w c].

    inputs holds what the embedders read ({"label": int32 [b]}), keys one key an image: image i is a function of
    keys[i] and inputs[i]. num_steps and guidance_scale default to the config's; a scale of 1 is no guidance and half the
    work. inpaint = (image, mask) keeps the image where the mask is 1. Compiles once per (b, num_steps, log_every).
    Raises ConfigError for a wrong option.
    """
    factory = pick(SAMPLERS, sampler["name"], "config.sampler.name")
    options = bind(factory, sampler, "config.sampler", given=_GIVEN)
    default_steps = options.pop("num_steps")
    pick(GUIDERS, guider["name"], "config.guidance.name")
    default_scale = float(bind(GUIDERS[guider["name"]], guider, "config.guidance", given=_GIVEN)["scale"])
    rows = batch_sharding(mesh)

    @partial(jax.jit, static_argnames=("num_steps", "guided", "log_every"), out_shardings=replicated(mesh))
    def run(params, frozen, inputs, keys, scale, inpaint, *, num_steps, guided, log_every):
        schedule = frozen["schedule"]
        steps = factory(schedule, num_steps, parameterization=parameterization, **options)
        predict = _predict(network, params, inputs, scale if guided else None)
        before = None if inpaint is None else samplers.inpaint(schedule, *inpaint)
        x = samplers.initial_noise(keys, network.image_shape)
        return samplers.sample(steps, predict, x, keys, log_every=log_every, before_step=before)

    def sample_fn(
        params: PyTree,
        frozen: PyTree,
        inputs: Batch,
        keys: Keys,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        log_every: int | None = None,
        inpaint: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> samplers.Samples:
        scale = default_scale if guidance_scale is None else guidance_scale
        inputs, keys, inpaint = _place((dict(inputs), keys, inpaint), rows, mesh)
        return run(
            params,
            frozen,
            inputs,
            keys,
            jnp.float32(scale),
            inpaint,
            num_steps=default_steps if num_steps is None else num_steps,
            guided=scale != 1.0 and bool(network.embedders),
            log_every=log_every,
        )

    return sample_fn
