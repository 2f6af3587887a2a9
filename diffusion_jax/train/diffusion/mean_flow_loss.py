"""The loss of MeanFlow on a batch, made from a network that reads two times."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion import mean_flow
from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.diffusion.preconditioning import Scaling
from diffusion_jax.diffusion.sigma_sampling import SigmaOf, quantiles
from diffusion_jax.randomness import noise_like
from diffusion_jax.train.diffusion.timestep_loss import Apply, Embed, Encode
from diffusion_jax.types import DURATION, Batch, Conditioning, Keys, PyTree


def mean_flow_loss_fn(
    apply: Apply,
    embed: Embed,
    encode: Encode,
    *,
    scaling: Scaling,
    sigma_of: SigmaOf,
    batch_size: int,
    flow_ratio: float = 0.75,
    guidance_scale: float = 1.0,
    kappa: float = 0.0,
    power: float = 1.0,
    stratified: bool = False,
) -> Callable:
    """Make the LossFn of MeanFlow training: the network learns the mean velocity from r to t.

    The network reads c_noise of t and, as its duration, how far the c_noise of r is below it.
    Everything random about sample i comes from keys[i].

    apply, embed, encode, batch_size, stratified: as in denoiser_loss_fn. scaling: the scaling
        `flow`. sigma_of: u [b] in [0, 1) -> sigma = t / (1 - t), from which two times are drawn;
        t is the larger one.
    flow_ratio: the share of samples with r = t, which learn flow matching.
    guidance_scale, kappa: of guidance, which the network learns to follow without a second call;
        see mean_flow.guided_velocity. A scale of 1 is none.
    power: see mean_flow.adaptive_loss.

    Raises ValueError for a batch_size below 1.
    Source: Geng et al. 2025, algorithm 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r} should be at least 1")

    def loss_fn(
        params: PyTree, mutable: Mapping, frozen: PyTree, batch: Batch, keys: Keys, *, train: bool
    ) -> tuple[Array, tuple[dict[str, Array], Mapping]]:
        keys = jax.vmap(lambda key: jax.random.split(key, 7))(keys)
        x_start = encode(frozen, batch, keys[:, 4])
        noise = noise_like(keys[:, 1], x_start.shape[1:])
        strata = (batch["position"], batch_size) if stratified and train else (None, None)
        t, r = _times(sigma_of, keys[:, 0], keys[:, 5], *strata)
        r = jnp.where(quantiles(keys[:, 6]) < flow_ratio, t, r)
        z = x_start + expand(t, x_start) * (noise - x_start)
        dropout_key = keys[0, 3] if train else None

        mean_velocity = functools.partial(_bind, apply, scaling, params, dropout_key)

        conditioning = embed(params, frozen, batch, keys[:, 2] if train else None)
        v = noise - x_start
        if guidance_scale != 1.0:
            null = embed(params, frozen, batch, None, unconditional=True)
            at = lambda conditioning: jax.lax.stop_gradient(mean_velocity(conditioning)(z, t, t))
            v = mean_flow.guided_velocity(
                v,
                at(conditioning) if kappa > 0.0 else None,
                at(null),
                _same(conditioning, null),
                guidance_scale=guidance_scale,
                kappa=kappa,
            )
        u, target = mean_flow.velocity_and_target(mean_velocity(conditioning), z, t, r, v)
        weight = batch["weight"] if "weight" in batch else None
        loss, metrics = mean_flow.adaptive_loss(u, target, power, weight)
        return loss, (metrics, mutable)

    return loss_fn


def _bind(
    apply: Apply, scaling: Scaling, params: PyTree, dropout_key: Any, conditioning: Conditioning
) -> mean_flow.MeanVelocity:
    """Make u(z, t, r) of a network."""

    def mean_velocity(z: Array, t: Array, r: Array) -> Array:
        level, end = (scaling(s / (1.0 - s)).c_noise for s in (t, r))
        return apply(params, z, level, {**conditioning, DURATION: level - end}, dropout_key)

    return mean_velocity


def _times(
    sigma_of: SigmaOf,
    first: Keys,
    second: Keys,
    position: Array | None,
    batch_size: int | None,
) -> tuple[Array, Array]:
    """Draw two times of each sample, the larger one first."""
    sigmas = sigma_of(quantiles(first, position, batch_size)), sigma_of(quantiles(second))
    one, other = (sigma / (1.0 + sigma) for sigma in sigmas)
    return jnp.maximum(one, other), jnp.minimum(one, other)


def _same(conditioning: Conditioning, other: Conditioning) -> Array:
    """Find the samples whose entries are the same in both, bool [b]."""
    found = [
        jnp.all((conditioning[name] == other[name]).reshape(len(other[name]), -1), axis=1)
        for name in other
    ]
    return jnp.all(jnp.stack(found), axis=0)
