"""The loss of a DDPM on a batch, made from a network, its embedders and a Schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from diffusion_jax.diffusion import ddpm, losses
from diffusion_jax.train.diffusion.noising import (
    PLAIN,
    NoiseOptions,
    check_noising,
    draw_noise,
)
from diffusion_jax.types import Batch, Conditioning, Keys, PyTree

# (params, x_t, t, conditioning, dropout_key or None) -> model output
Apply = Callable[..., Array]
# (params, frozen, batch, keys or None) -> conditioning
Embed = Callable[..., Conditioning]
# (frozen, batch, keys) -> x_start [b h w c]: the images, or their latents
Encode = Callable[..., Array]


def diffusion_loss(
    apply: Apply,
    embed: Embed,
    encode: Encode,
    *,
    loss: Callable[..., Any] = losses.ddpm_loss,
    noising: NoiseOptions = PLAIN,
    **loss_options: Any,
) -> Callable:
    """Make the LossFn of DDPM training (Ho et al. 2020, algorithm 1; latent-diffusion's p_losses).

    The LossFn denoises what encode finds in a batch. It reads frozen["schedule"], and logvar
    [t] from the parameters if it is learned, else from frozen; t is uniform over the schedule.
    loss is called as losses.ddpm_loss is, with loss_options; noising says what noise is added. A
    batch may carry "weight" [b] (0 for padding), and "loss_mask" [b h w 1] and "loss_weight" [b],
    how much each pixel and each sample counts: see losses.cells_of.
    Everything random about sample i comes from keys[i].

    Raises ValueError when a number of noising is out of range.
    """
    check_noising(noising)

    def loss_fn(
        params: PyTree,
        mutable: Mapping,
        frozen: PyTree,
        batch: Batch,
        keys: Keys,
        *,
        train: bool,
    ) -> tuple[Array, tuple[dict[str, Array], Mapping]]:
        schedule = frozen["schedule"]
        keys = jax.vmap(lambda key: jax.random.split(key, 6))(keys)
        x_start = encode(frozen, batch, keys[:, 4])
        t = jax.vmap(lambda key: jax.random.randint(key, (), 0, schedule.num_timesteps))(keys[:, 0])
        own = noising if train else noising._replace(input_perturbation=0.0)
        noise, seen = draw_noise(keys[:, 1], keys[:, 5], x_start.shape[1:], own)
        x_t = ddpm.q_sample(schedule, x_start, t, seen)
        conditioning = embed(params, frozen, batch, keys[:, 2] if train else None)
        output = apply(params, x_t, t, conditioning, keys[0, 3] if train else None)
        value, metrics = loss(
            schedule,
            output,
            x_start,
            x_t,
            t,
            noise,
            logvar=params["logvar"] if "logvar" in params else frozen["logvar"],
            weight=batch["weight"] if "weight" in batch else None,
            cells=losses.cells_of(batch, x_start),
            **loss_options,
        )
        return value, (metrics, mutable)

    return loss_fn
