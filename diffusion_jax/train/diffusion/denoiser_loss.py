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
from diffusion_jax.randomness import noise_like
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
    loss_type: Literal["l2", "l1", "huber"] = "l2",
    offset_noise_level: float = 0.0,
) -> Callable:
    """Make the LossFn of denoiser training: mean of w(sigma) |D(x_0 + sigma eps, sigma) - x_0|^2.

    The LossFn denoises what encode finds in a batch. It reads frozen["sigmas"], the table of the
    discrete denoiser, if there is one; without it the denoiser is continuous. A batch may have
    "weight" [b] (0 for padding), and "loss_mask" [b h w 1], how much each pixel counts: see
    losses.cells_of. Everything random about sample i comes from keys[i].

    apply: the network; its third argument is c_noise [b], int32 with a table and
        quantize_c_noise, else float32.
    embed: the embedders.
    encode: finds the images, or their latents. scaling: sigma -> c_skip, c_out, c_in, c_noise.
    sigma_of: u [b] in [0, 1) -> sigma [b]; u is uniform, independent for each sample.
    weighting: sigma -> w(sigma).
    batch_size: samples of the global batch, before it is split among devices or micro-batches.
    stratified: in training, let the global batch cover [0, 1) evenly, sample i in stratum
        batch["position"][i]; evaluation, whose batches may be padded, draws independently.
    quantize_c_noise: give the network the index of sigma in the table.
    loss_type: of D and x_0, in place of the square.
    offset_noise_level: how much of the noise all pixels of a channel share, see
        losses.offset_noise.

    Raises ValueError when batch_size is below 1 or offset_noise_level below 0.
    Source: Karras et al. 2022, equations 2 and 8; sgm, StandardDiffusionLoss.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r} should be at least 1")
    if not offset_noise_level >= 0.0:
        raise ValueError(f"offset_noise_level = {offset_noise_level!r} should be at least 0")

    def loss_fn(
        params: PyTree, mutable: Mapping, frozen: PyTree, batch: Batch, keys: Keys, *, train: bool
    ) -> tuple[Array, tuple[dict[str, Array], Mapping]]:
        keys = jax.vmap(lambda key: jax.random.split(key, 6))(keys)
        x_start = encode(frozen, batch, keys[:, 4])
        strata = (batch["position"], batch_size) if stratified and train else (None, None)
        sigma = sigma_of(quantiles(keys[:, 0], *strata))
        noise = noise_like(keys[:, 1], x_start.shape[1:])
        if offset_noise_level > 0.0:
            noise = losses.offset_noise(noise, keys[:, 5], offset_noise_level)
        conditioning = embed(params, frozen, batch, keys[:, 2] if train else None)
        dropout_key = keys[0, 3] if train else None
        denoise = denoiser(
            lambda x, c_noise, conditioning: apply(params, x, c_noise, conditioning, dropout_key),
            scaling,
            frozen["sigmas"] if "sigmas" in frozen else None,
            quantize_c_noise=quantize_c_noise,
        )
        denoised = denoise(x_start + expand(sigma, x_start) * noise, sigma, conditioning)
        weight = batch["weight"] if "weight" in batch else None
        cells = losses.cells_of(batch["loss_mask"], x_start) if "loss_mask" in batch else None
        loss, metrics = losses.denoiser_loss(
            denoised, x_start, sigma, weighting, loss_type=loss_type, weight=weight, cells=cells
        )
        return loss, (metrics, mutable)

    return loss_fn
