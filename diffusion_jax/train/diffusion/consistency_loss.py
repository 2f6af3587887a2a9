"""The loss of consistency training on a batch: neighbours on a path have one end."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.diffusion.losses import Sample, sample_means, weighted_mean
from diffusion_jax.diffusion.preconditioning import Scaling, denoiser
from diffusion_jax.diffusion.sigma_sampling import SigmaOf, quantiles
from diffusion_jax.randomness import noise_like
from diffusion_jax.train.diffusion.timestep_loss import Apply, Embed, Encode
from diffusion_jax.types import Batch, Keys, PerSample, PyTree

_RHO = 7.0  # how densely levels lie, as in the grid `edm`


def consistency_loss_fn(
    apply: Apply,
    embed: Embed,
    encode: Encode,
    *,
    scaling: Scaling,
    sigma_of: SigmaOf,
    batch_size: int,
    total_steps: int,
    num_levels: tuple[int, int] = (10, 1280),
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    stratified: bool = False,
) -> Callable:
    """Make the LossFn of consistency training: f(x at sigma_{n+1}) against f(x at sigma_n).

    Both x are x_0 with the same noise eps, and f at the lower level is the target, without
    gradients. The loss is the mean of (sqrt(|difference|^2 + c^2) - c) / (sigma_{n+1} - sigma_n),
    with c = 0.00054 sqrt(numbers of a sample). Everything random about sample i comes from keys[i].

    apply, embed, encode, batch_size, stratified: as in denoiser_loss_fn. scaling: the scaling
        `consistency`, with its sigma_min. sigma_of: u [b] in [0, 1) -> a level; it is rounded down
        to one of the grid between sigma_min and sigma_max.
    total_steps: updates of the training. num_levels: stretches between the levels of the grid, at
        the beginning and at the end, see `doubling`. Evaluation has the finest grid.

    Raises ValueError for a batch_size or total_steps below 1, and for numbers out of order.
    Source: Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models".
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r} should be at least 1")
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min = {sigma_min!r} and sigma_max = {sigma_max!r} should be positive and in "
            "this order"
        )
    count_levels = doubling(total_steps, num_levels)

    def loss_fn(
        params: PyTree, mutable: Mapping, frozen: PyTree, batch: Batch, keys: Keys, *, train: bool
    ) -> tuple[Array, tuple[dict[str, Array], Mapping]]:
        keys = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
        x_start = encode(frozen, batch, keys[:, 4])
        noise = noise_like(keys[:, 1], x_start.shape[1:])
        strata = (batch["position"], batch_size) if stratified and train else (None, None)
        drawn = sigma_of(quantiles(keys[:, 0], *strata))
        stretches = count_levels(batch["step"] if "step" in batch else None)
        low, high = neighbours(drawn, stretches, sigma_min, sigma_max)
        conditioning = embed(params, frozen, batch, keys[:, 2] if train else None)
        dropout_key = keys[0, 3] if train else None
        denoise = denoiser(
            lambda x, c_noise, conditioning: apply(params, x, c_noise, conditioning, dropout_key),
            scaling,
        )
        image, target = (
            denoise(x_start + expand(sigma, x_start) * noise, sigma, conditioning)
            for sigma in (high, low)
        )
        weight = batch["weight"] if "weight" in batch else None
        apart = pseudo_huber(image - jax.lax.stop_gradient(target))
        loss = weighted_mean(apart / (high - low), weight)
        off = sample_means(jnp.square(image - x_start))
        metrics = {"loss": loss, "loss_x0": weighted_mean(off, weight)}
        return loss, (metrics, mutable)

    return loss_fn


def doubling(
    total_steps: int, num_levels: tuple[int, int]
) -> Callable[[Array | None], Int[Array, "*b"]]:
    """Make the function step -> how many stretches lie between the levels of the grid.

    It begins with num_levels[0] and doubles as often as num_levels[1] takes, each time after an
    equal share of the training; None is its end.
    Raises ValueError for total_steps below 1, and num_levels below 2 or out of order.
    """
    few, many = num_levels
    if total_steps < 1:
        raise ValueError(f"total_steps = {total_steps!r} should be at least 1")
    if not 2 <= few <= many:
        raise ValueError(f"num_levels = {num_levels!r} should be at least 2 and in order")
    times = math.ceil(math.log2(many / few))
    share = max(total_steps // (times + 1), 1)

    def count(step: Array | None) -> Array:
        if step is None:
            return jnp.asarray(many)
        return jnp.minimum(few * 2 ** jnp.minimum(step // share, times), many)

    return count


def pseudo_huber(difference: Sample) -> PerSample:
    """Compute sqrt(|difference|^2 + c^2) - c of each sample, c = 0.00054 sqrt(its numbers).

    Source: Song and Dhariwal 2023, section 3.3.
    """
    flat = difference.reshape(len(difference), -1)
    c = 0.00054 * math.sqrt(flat.shape[1])
    return jnp.sqrt(jnp.sum(flat**2, axis=1) + c**2) - c


def neighbours(
    sigma: PerSample, stretches: Array, sigma_min: float, sigma_max: float
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Find the two levels of a grid around sigma; the grid has stretches + 1 levels, as `edm` has.

    Where sigma is outside of the grid, they are the nearest two.
    """
    bottom, top = sigma_min ** (1 / _RHO), sigma_max ** (1 / _RHO)
    place = (sigma ** (1 / _RHO) - bottom) / (top - bottom) * stretches
    index = jnp.clip(jnp.floor(place), 0.0, stretches - 1.0)
    low, high = ((bottom + (top - bottom) * (index + i) / stretches) ** _RHO for i in (0.0, 1.0))
    return low, high
