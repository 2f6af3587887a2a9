"""The `sampler` and `guidance` sections -> the one sample_fn that Pipeline, image hook, evaluation
and CLI call."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from diffusion_jax.build.binding import ConfigError, bind, row
from diffusion_jax.build.network import Network
from diffusion_jax.diffusion import guidance, samplers
from diffusion_jax.diffusion.schedule import Schedule
from diffusion_jax.sharding import batch_sharding, replicated
from diffusion_jax.types import Batch, Conditioning, Keys, Predict, PyTree

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
    schedule: Schedule,
    parameterization: str,
    mesh: Mesh,
) -> tuple[SampleFn, int]:
    """Assemble the sample_fn of a config, and its default number of steps.

    sample_fn: inputs and keys [b] -> Samples, x float32 [b h w c].

    inputs holds what the embedders read ({"label": int32 [b]}), keys one key an image: image i is
    a function of keys[i] and inputs[i]. num_steps and guidance_scale default to the config's; a
    scale of 1 is no guidance and half the work. inpaint = (image, mask) keeps the image where the
    mask is 1. Compiles once per (b, num_steps, log_every).
    Raises ValueError for a wrong option; `schedule` serves that check only, sample_fn takes its
    own from frozen.
    """
    factory = row(SAMPLERS, sampler, "config.sampler")
    options = bind(factory, sampler, "config.sampler", given=_GIVEN)
    default_steps = options.pop("num_steps")
    factory(schedule, default_steps, parameterization=parameterization, **options)
    default_scale = _default_scale(guider, network)

    @functools.partial(
        jax.jit,
        static_argnames=("num_steps", "guided", "log_every"),
        out_shardings=replicated(mesh),
    )
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
        inputs: Mapping[str, np.ndarray | Array],
        keys: Keys,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        log_every: int | None = None,
        inpaint: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> samplers.Samples:
        scale = default_scale if guidance_scale is None else guidance_scale
        _check_scale(scale, network)
        inputs, keys, inpaint = _place((dict(inputs), keys, inpaint), mesh)
        return run(
            params,
            frozen,
            inputs,
            keys,
            jnp.float32(scale),
            inpaint,
            num_steps=default_steps if num_steps is None else num_steps,
            guided=scale != 1.0,
            log_every=log_every,
        )

    return sample_fn, default_steps


def _default_scale(guider: Mapping[str, Any], network: Network) -> float:
    guide = row(GUIDERS, guider, "config.guidance")
    # Without a guider the conditional prediction is followed: a scale of 1.
    scale = ({"scale": 1.0} | bind(guide, guider, "config.guidance", given=_GIVEN))["scale"]
    if scale != 1.0 and not _can_guide(network):
        raise ConfigError(
            f"config.guidance.scale = {scale} needs an embedder with ucg_rate > 0: without "
            "dropped conditions in training there is no unconditional prediction to guide away from"
        )
    return float(scale)


def _check_scale(scale: float, network: Network) -> None:
    if not math.isfinite(scale) or (scale != 1.0 and not _can_guide(network)):
        wanted = "finite" if _can_guide(network) else "1: no condition was dropped in training"
        raise ValueError(f"guidance_scale = {scale} should be {wanted}")


def _can_guide(network: Network) -> bool:
    return any(embedder.ucg_rate > 0.0 for embedder in network.embedders.values())


def _predict(network: Network, params: PyTree, inputs: Batch, scale: Array | None) -> Predict:
    def apply(x: Array, t: Array, conditioning: Conditioning) -> Array:
        return network.apply(params, x, t, conditioning)

    conditioning = network.embed(params, inputs)
    if scale is None:
        return guidance.identity(apply, conditioning)
    unconditional = network.embed(params, inputs, unconditional=True)
    return guidance.cfg(apply, conditioning, unconditional, scale)


def _place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put host values on the mesh, split over it when their rows divide by it, else a copy on each
    device."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(leaf: Any) -> Array:
        rows = batch_sharding(mesh) if leaf.shape[0] % shards == 0 else replicated(mesh)
        return jax.device_put(leaf, rows)

    return jax.tree.map(put, tree)
