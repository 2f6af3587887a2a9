"""What diffusion training minimises."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion_jax.diffusion.ddpm import expand, get_v
from diffusion_jax.diffusion.schedule import Schedule, check_choice
from diffusion_jax.diffusion.weighting import Weighting
from diffusion_jax.randomness import noise_like
from diffusion_jax.types import Batch, Keys, PerSample, Timesteps

Sample = Float[Array, "b *shape"]


def ddpm_loss(
    schedule: Schedule,
    model_output: Sample,
    x_start: Sample,
    x_t: Sample,
    t: Timesteps,
    noise: Sample,
    *,
    parameterization: Literal["eps", "x0", "v"] = "eps",
    loss_type: Literal["l2", "l1", "huber"] = "l2",
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
    logvar: Float[Array, "T"] | None = None,
    learn_logvar: bool = False,
    min_snr_gamma: float | None = None,
    weight: PerSample | None = None,
    cells: Float[Array, "b ..."] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Compute the training loss: mean of l / exp(s_t) + s_t, plus the variational term.

    With l the error of a sample averaged over all axes but the first, in float32,
    loss = l_simple_weight * mean(w_t l / exp(s_t) + s_t) + original_elbo_weight * mean(lvlb_t l).

    x_t is what the network saw; the targets need only x_start and noise.
    logvar: s, one entry a timestep; None is s = 0 (the DDPM form). It gets gradients only with
      learn_logvar.
    min_snr_gamma: w_t = min(snr, gamma) / snr for eps, min(snr, gamma) for x0 and
      min(snr, gamma) / (snr + 1) for v (Hang et al. 2023); None is w_t = 1.
    weight: of each sample in every mean (0 for padding); None is equal weights.
    cells: what multiplies the error of each element before l is averaged, of a shape that fits;
      None is 1. It is not normalised, so a sample with few cells of weight counts less, and one
      whose only cell is 0.5 half.

    Returns: the loss, and metrics: loss, loss_simple (unweighted mean of l), loss_vlb, and with
      learn_logvar loss_gamma (the mean with w and s) and logvar (the mean of s).

    Raises ValueError for unknown names, a min_snr_gamma that is not positive, and learn_logvar
    without a logvar.
    Source: Ho et al. 2020, equation 14; latent-diffusion, LatentDiffusion.p_losses.
    """
    if learn_logvar and logvar is None:
        raise ValueError("learn_logvar = True needs a logvar array with one entry a timestep")
    target = training_target(schedule, x_start, noise, t, parameterization)
    errors = _in_cells(elementwise_loss(model_output, target, loss_type), cells)
    per_sample = sample_means(errors)
    gamma = per_sample
    if min_snr_gamma is not None:
        gamma = gamma * min_snr_weights(schedule, t, min_snr_gamma, parameterization)
    if logvar is not None:
        logvar = logvar if learn_logvar else jax.lax.stop_gradient(logvar)
        gamma = gamma / jnp.exp(logvar[t]) + logvar[t]
    loss_vlb = weighted_mean(schedule.lvlb_weights[t] * per_sample, weight)
    loss_gamma = weighted_mean(gamma, weight)
    loss = l_simple_weight * loss_gamma + original_elbo_weight * loss_vlb
    metrics = {
        "loss": loss,
        "loss_simple": weighted_mean(per_sample, weight),
        "loss_vlb": loss_vlb,
    }
    if learn_logvar and logvar is not None:
        metrics |= {"loss_gamma": loss_gamma, "logvar": logvar.mean()}
    return loss, metrics


def denoiser_loss(
    denoised: Sample,
    x_start: Sample,
    sigma: PerSample,
    weighting: Weighting,
    *,
    loss_type: Literal["l2", "l1", "huber"] = "l2",
    weight: PerSample | None = None,
    cells: Float[Array, "b ..."] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Compute the loss of a denoiser: mean of w(sigma) l, with l the error of D(x, sigma) on x_0.

    l is averaged over all axes but the first, in float32. The weighting says what is compared, the
    network's eps, v or F, see weighting.py; this holds for l2 (l1 is weighted as upstream does it,
    by the same w).
    weight: of each sample in every mean (0 for padding); None is equal weights. cells: as in
      ddpm_loss.

    Returns: the loss, and metrics: loss, and loss_x0, the mean of l without w.

    Raises ValueError for an unknown loss_type and shapes that differ.
    Source: Karras et al. 2022, equation 2; sgm, StandardDiffusionLoss.
    """
    errors = _in_cells(elementwise_loss(denoised, x_start, loss_type), cells)
    per_sample = sample_means(errors)
    loss = weighted_mean(weighting(sigma) * per_sample, weight)
    return loss, {"loss": loss, "loss_x0": weighted_mean(per_sample, weight)}


def offset_noise(noise: Sample, keys: Keys, level: float) -> Float[Array, "b *shape"]:
    """Shift whole channels of the noise: noise + level N(0, 1) of shape [b 1 ... 1 c].

    Sample i takes its shift from keys[i]. With the frames of a video folded into the batch, each
    frame has its own; [b t h w c] shares one among all of them.
    Source: sgm, StandardDiffusionLoss, offset_noise_level; Guttenberg 2023. (Upstream's own code
    stops on an attribute that it never set, for every level above 0.)
    """
    shape = (1,) * (noise.ndim - 2) + noise.shape[-1:]
    return noise + level * noise_like(keys, shape)


def pyramid_noise(
    noise: Float[Array, "b *t h w c"], keys: Keys, discount: float, levels: int
) -> Float[Array, "b *t h w c"]:
    """Add noise of coarser grids: sum_i discount^i n_i / sqrt(sum_i discount^2i), n_0 the noise.

    n_i, i = 1 ... levels, is standard normal and constant in squares of 2^i pixels, so that the sum
    has variance 1 at every pixel. Each sample shifts each grid at random: the correlation of two
    pixels y and x apart is the mean over i of (1 - |y| / 2^i)+ (1 - |x| / 2^i)+ with weights
    discount^2i, wherever they lie. Grids beyond the first whose squares cover the picture are left
    out. Sample i takes all of it from keys[i].
    Source: Whitaker 2023, multi-resolution noise; his grids have random sides and soft edges.
    """
    *frames, height, width, channels = noise.shape[1:]
    levels = min(levels, (max(height, width) - 1).bit_length())

    def coarse(key: Key[Array, ""], side: int) -> Array:
        values_key, shift_key = jax.random.split(key)
        rows, columns = ((n + side - 2) // side + 1 for n in (height, width))
        shift = jax.random.randint(shift_key, (2,), 0, side)
        values = jax.random.normal(values_key, (*frames, rows, columns, channels))
        values = jnp.take(values, (jnp.arange(height) + shift[0]) // side, axis=-3)
        return jnp.take(values, (jnp.arange(width) + shift[1]) // side, axis=-2)

    keys = jax.vmap(lambda key: jax.random.split(key, levels))(keys)
    for level in range(1, levels + 1):
        added = jax.vmap(functools.partial(coarse, side=2**level))(keys[:, level - 1])
        noise = noise + discount**level * added
    return noise / math.sqrt(sum(discount ** (2 * level) for level in range(levels + 1)))


def training_target(
    schedule: Schedule, x_start: Sample, noise: Sample, t: Timesteps, parameterization: str
) -> Array:
    """Pick what the network should predict: eps -> noise, x0 -> x_start, v -> get_v."""
    check_choice("parameterization", parameterization, tuple(_TARGETS))
    return _TARGETS[parameterization](schedule, x_start, noise, t)


def elementwise_loss(prediction: Sample, target: Sample, loss_type: str) -> Array:
    """Compute the error of every element in float32: l2 = d^2, l1 = |d|, huber.

    huber is d^2 / 2 where |d| <= 1 and |d| - 1 / 2 elsewhere. Raises ValueError for other names.
    """
    check_choice("loss_type", loss_type, tuple(_ERRORS))
    if prediction.shape != target.shape:
        raise ValueError(
            f"the network's output has the shape {prediction.shape}; it should be "
            f"{target.shape}, the shape of the target"
        )
    return _ERRORS[loss_type](target.astype(jnp.float32) - prediction.astype(jnp.float32))


def cells_of(batch: Batch, x_start: Sample) -> Float[Array, "b ..."] | None:
    """Find what multiplies the error of each element of x_start: the cells of a loss.

    batch["loss_mask"] [b h w 1] says how much each pixel counts and is averaged over the latent
    pixels that pixels belong to. batch["loss_weight"] [b] multiplies the loss of each sample.
    Either may be missing; None where both are.
    Raises ValueError where the sides of a mask are no multiples of the sides of x_start.
    """
    cells = _latent_pixels(batch["loss_mask"], x_start) if "loss_mask" in batch else None
    if "loss_weight" not in batch:
        return cells
    weight = expand(batch["loss_weight"], x_start)
    return weight if cells is None else weight * cells


def _latent_pixels(
    pixels: Float[Array, "b h w 1"], x_start: Float[Array, "b h2 w2 c"]
) -> Float[Array, "b h2 w2 1"]:
    (b, height, width, _), (rows, columns) = pixels.shape, x_start.shape[1:3]
    if height % rows or width % columns:
        raise ValueError(
            f"the loss mask has the shape {pixels.shape}; its sides should be multiples of "
            f"{rows} x {columns}"
        )
    blocks = pixels.reshape(b, rows, height // rows, columns, width // columns, 1)
    return blocks.mean(axis=(2, 4))


def _in_cells(errors: Array, cells: Array | None) -> Array:
    return errors if cells is None else errors * cells


def min_snr_weights(
    schedule: Schedule, t: Timesteps, gamma: float, parameterization: str
) -> PerSample:
    """Weigh timesteps by min(snr, gamma), in units of the target (Hang et al. 2023, section 3.4).

    snr = abar / (1 - abar). Returns float32 [b]. Raises ValueError when gamma is not positive.
    """
    check_choice("parameterization", parameterization, tuple(_TARGETS))
    if not gamma > 0.0:
        raise ValueError(f"min_snr_gamma = {gamma!r} should be positive, or None for no weights")
    # Through 1 / snr, which stays finite where abar does not.
    inverse = schedule.sqrt_recipm1_alphas_cumprod[t] ** 2
    weights = jnp.minimum(1.0, gamma * inverse)
    if parameterization == "eps":
        return weights
    return weights / (inverse if parameterization == "x0" else 1.0 + inverse)


def sample_means(values: Float[Array, "b *shape"]) -> Float[Array, "b"]:
    """Average each sample over its elements."""
    return values.reshape(values.shape[0], -1).mean(axis=1)


def weighted_mean(values: PerSample, weight: PerSample | None) -> Float[Array, ""]:
    """Average over samples: sum(w x) / sum(w), 0 when all weights are 0; None is the plain mean."""
    if weight is None:
        return values.mean()
    total = weight.sum()
    return jnp.where(total > 0, (weight * values).sum() / jnp.where(total > 0, total, 1.0), 0.0)


# (schedule, x_start, noise, t) -> target
_TARGETS: dict[str, Callable[..., Array]] = {
    "eps": lambda schedule, x_start, noise, t: noise,
    "x0": lambda schedule, x_start, noise, t: x_start,
    "v": get_v,
}
_ERRORS: dict[str, Callable[[Array], Array]] = {
    "l2": jnp.square,
    "l1": jnp.abs,
    "huber": lambda d: jnp.where(jnp.abs(d) <= 1.0, 0.5 * d**2, jnp.abs(d) - 0.5),
}
