"""MeanFlow: the mean velocity over a stretch of a path, from which one step leads to its end.

In the time of flow matching z_t = (1 - t) x_0 + t eps, and the velocity is v = eps - x_0. The mean
velocity u(z, t, r) = 1 / (t - r) times the integral of v from r to t along the path through z_t
leads from z_t to z_r = z_t - (t - r) u. u(z, t, t) is the velocity itself.
Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.diffusion.losses import Sample, weighted_mean
from diffusion_jax.types import PerSample

# (z [b ...], t [b], r [b]) -> the mean velocity from r to t, like z
MeanVelocity = Callable[[Array, Array, Array], Array]


def velocity_and_target(
    mean_velocity: MeanVelocity, z: Sample, t: PerSample, r: PerSample, v: Sample
) -> tuple[Float[Array, "b *shape"], Float[Array, "b *shape"]]:
    """Compute u(z, t, r), and what it should be: v - (t - r) du/dt, without gradients.

    du/dt is the derivative along the path, on which z moves by v and r stays: one jvp. Where u is
    the mean velocity and v the velocity at z, both are equal (equation 6 of the paper).
    """
    moves = (v, jnp.ones_like(t), jnp.zeros_like(r))
    u, slope = jax.jvp(mean_velocity, (z, t, r), moves)
    return u, jax.lax.stop_gradient(v - expand(t - r, z) * slope)


def guided_velocity(
    v: Sample,
    conditional: Sample | None,
    unconditional: Sample,
    dropped: Bool[Array, "b"],
    *,
    guidance_scale: float,
    kappa: float,
) -> Float[Array, "b *shape"]:
    """Mix the velocity that a guided network learns: omega v + kappa g + (1 - omega - kappa) u.

    Where g itself is what is learned, it is u + guidance_scale (mean of v - u) on average, as in
    guidance without a classifier: omega = guidance_scale (1 - kappa).

    conditional g, unconditional u: what the network predicts at the same place; g, with which the
      target is less noisy, is not needed for kappa = 0. dropped: samples without conditions, which
      learn v.
    Source: Geng et al. 2025, section 4.2 and equation 20.
    """
    omega = guidance_scale * (1.0 - kappa)
    mixed = omega * v + (1.0 - omega - kappa) * unconditional
    if conditional is not None:
        mixed = mixed + kappa * conditional
    return jnp.where(expand(dropped, v), v, mixed)


def adaptive_loss(
    prediction: Sample, target: Sample, power: float, weight: PerSample | None = None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Average w |prediction - target|^2 over samples, w = (|prediction - target|^2 + 0.001)^-power.

    w has no gradient; power 0 is the squared error, 1 counts every sample alike. weight: of each
    sample in every mean (0 for padding).

    Returns: the loss, and metrics: loss, and loss_velocity, the squared error of an element.
    Source: Geng et al. 2025, equation 22; Geng et al. 2024 (ECT).
    """
    errors = jnp.square((prediction - target).astype(jnp.float32)).reshape(len(target), -1)
    squared = errors.sum(axis=1)
    factor = jax.lax.stop_gradient((squared + 1e-3) ** -power)
    loss = weighted_mean(factor * squared, weight)
    return loss, {"loss": loss, "loss_velocity": weighted_mean(errors.mean(axis=1), weight)}
