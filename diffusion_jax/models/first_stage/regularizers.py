"""What turns an encoder's output into a latent: a diagonal Gaussian, or nothing at all.

A regularizer takes moments [b ... m] and returns (z [b ... d], log), where log holds numbers [b]
that the loss may weigh by name. Codebooks are in quantizers.py.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


class DiagonalGaussian(NamedTuple):
    """N(mean, exp(logvar)) with independent entries, in float32: mean and logvar [b ... d]."""

    mean: Float[Array, "b *dims d"]
    logvar: Float[Array, "b *dims d"]


def diagonal_gaussian(moments: Float[Array, "b *dims m"]) -> DiagonalGaussian:
    """Split moments [b ... 2d] into mean and log variance, the latter clipped to [-30, 20].

    Raises ValueError for an odd number of channels.
    Source: latent diffusion, modules/distributions, DiagonalGaussianDistribution.
    """
    if moments.shape[-1] % 2:
        raise ValueError(
            f"moments have {moments.shape[-1]} channels; a mean and a log variance need an even "
            "number (double_z = True)"
        )
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return DiagonalGaussian(mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR))


def sample(
    gaussian: DiagonalGaussian, noise: Float[Array, "b *dims d"]
) -> Float[Array, "b *dims d"]:
    """Compute a draw, mean + exp(logvar / 2) noise, from N(0, 1) noise."""
    return gaussian.mean + jnp.exp(0.5 * gaussian.logvar) * noise


def mode(gaussian: DiagonalGaussian) -> Float[Array, "b *dims d"]:
    """Take the likeliest value, the mean."""
    return gaussian.mean


def kl(gaussian: DiagonalGaussian, other: DiagonalGaussian | None = None) -> Float[Array, "b"]:
    """KL divergence in nats, summed over all but b, to `other` or to N(0, 1).

    1/2 sum((mean - mean')^2 / var' + var / var' - 1 - logvar + logvar').
    Source: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", appendix B.
    """
    mean, logvar = gaussian
    if other is None:
        terms = jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar
    else:
        difference = logvar - other.logvar
        scaled = jnp.square(mean - other.mean) * jnp.exp(-other.logvar)
        terms = scaled + jnp.exp(difference) - 1.0 - difference
    return 0.5 * _sum_over_sample(terms)


def nll(gaussian: DiagonalGaussian, value: Float[Array, "b *dims d"]) -> Float[Array, "b"]:
    """Negative log density of a value in nats, summed over all but b.

    1/2 sum(log 2 pi + logvar + (value - mean)^2 / var).
    """
    mean, logvar = gaussian
    scaled = jnp.square(value - mean) * jnp.exp(-logvar)
    return 0.5 * _sum_over_sample(math.log(2.0 * math.pi) + logvar + scaled)


def gaussian_regularizer(
    moments: Float[Array, "b *dims m"], noise: Float[Array, "b *dims d"] | None = None
) -> tuple[Float[Array, "b *dims d"], dict[str, Float[Array, "b"]]]:
    """Draw the latent from N(0, 1) noise (without it: take the mean), and log the KL divergence.

    moments [b ... 2d] -> z [b ... d], {"kl_loss": divergence [b] from N(0, 1), in nats}.
    Source: generative-models, DiagonalGaussianRegularizer.
    """
    gaussian = diagonal_gaussian(moments)
    z = mode(gaussian) if noise is None else sample(gaussian, noise)
    return z, {"kl_loss": kl(gaussian)}


def identity_regularizer(
    moments: Float[Array, "b *dims d"], noise: Array | None = None
) -> tuple[Float[Array, "b *dims d"], dict[str, Float[Array, "b"]]]:
    """Take the encoder's output as the latent, and log nothing; noise is not used."""
    del noise
    return moments, {}


def _sum_over_sample(terms: Array) -> Array:
    return jnp.sum(terms, axis=tuple(range(1, terms.ndim)))
