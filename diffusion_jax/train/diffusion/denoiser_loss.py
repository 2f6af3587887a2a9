"""The loss of a denoiser on a batch, made from a network, its embedders and noise levels."""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
from jaxtyping import Array

from diffusion_jax.diffusion import losses
from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.diffusion.preconditioning import Scaling, denoiser
from diffusion_jax.diffusion.sigma_sampling import SigmaOf, quantiles
from diffusion_jax.diffusion.weighting import Weighting
from diffusion_jax.train.diffusion.noising import (
    PLAIN,
    NoiseOptions,
    check_noising,
    draw_noise,
)
from diffusion_jax.train.diffusion.timestep_loss import Apply, Embed, Encode
from diffusion_jax.types import Batch, Keys, PyTree


def denoiser_loss_fn(
    apply: Apply,
    embed: Embed,
    encode: Encode,
    *,
    scaling: Scaling,
    sigma_of: SigmaOf,
    weighting: Weighting,
    batch_size: int,
    stratified: bool = False,
    quantize_c_noise: bool = True,
    around: str | None = None,
    loss_type: Literal["l2", "l1", "huber"] = "l2",
    noising: NoiseOptions = PLAIN,
) -> Callable:
    """Make the LossFn of denoiser training: mean of w(sigma) |D(x_0 + sigma eps, sigma) - x_0|^2.

    The LossFn denoises what encode finds in a batch. It reads frozen["sigmas"], the table of the
    discrete denoiser, if there is one; without it the denoiser is continuous. A batch may have
    "weight" [b] (0 for padding), and "loss_mask" [b h w 1] and "loss_weight" [b], how much each
    pixel and each sample counts: see losses.cells_of. Everything random about sample i comes from
    keys[i].

    apply: the network; its third argument is c_noise [b], int32 with a table and
        quantize_c_noise, else float32.
    embed: the embedders. encode: finds the images, or their latents.
    scaling: sigma -> c_skip, c_out, c_in, c_noise. weighting: sigma -> w(sigma).
    sigma_of: u [b] in [0, 1) -> sigma [b]; u is uniform, independent for each sample.
    batch_size: samples of the global batch, before it is split among devices or micro-batches.
    stratified: in training, let the global batch cover [0, 1) evenly, sample i in stratum
        batch["position"][i]; evaluation, whose batches may be padded, draws independently.
    quantize_c_noise: give the network the index of sigma in the table. loss_type: of D and x_0.
    around: see preconditioning.denoiser. noising: what noise is added. Where the input is
        perturbed, c_skip multiplies what it was before, so that F is asked for the same as without.

    Raises ValueError when batch_size is below 1 or a number of noising is out of range.
    Source: Karras et al. 2022, equations 2 and 8; sgm, StandardDiffusionLoss.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r} should be at least 1")
    check_noising(noising)

    def loss_fn(
        params: PyTree, mutable: Mapping, frozen: PyTree, batch: Batch, keys: Keys, *, train: bool
    ) -> tuple[Array, tuple[dict[str, Array], Mapping]]:
        keys = jax.vmap(lambda key: jax.random.split(key, 6))(keys)
        x_start = encode(frozen, batch, keys[:, 4])
        strata = (batch["position"], batch_size) if stratified and train else (None, None)
        sigma = sigma_of(quantiles(keys[:, 0], *strata))
        own = noising if train else noising._replace(input_perturbation=0.0)
        noise, seen = draw_noise(keys[:, 1], keys[:, 5], x_start.shape[1:], own)
        shift = expand(scaling(sigma).c_in * sigma, x_start) * (seen - noise)
        conditioning = embed(params, frozen, batch, keys[:, 2] if train else None)
        dropout_key = keys[0, 3] if train else None
        moved = (lambda x: x) if seen is noise else lambda x: x + shift
        denoise = denoiser(
            lambda x, level, given: apply(params, moved(x), level, given, dropout_key),
            scaling,
            frozen["sigmas"] if "sigmas" in frozen else None,
            quantize_c_noise=quantize_c_noise,
            around=around,
        )
        denoised = denoise(x_start + expand(sigma, x_start) * noise, sigma, conditioning)
        weight = batch["weight"] if "weight" in batch else None
        counts = {"weight": weight, "cells": losses.cells_of(batch, x_start)}
        read = denoised, x_start, sigma, weighting
        loss, metrics = losses.denoiser_loss(*read, loss_type=loss_type, **counts)
        return loss, (metrics, mutable)

    return loss_fn
