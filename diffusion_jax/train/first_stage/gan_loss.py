"""The discriminator of a first stage: what each side minimises, and how much it counts."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.losses import sample_means, weighted_mean
from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.types import PerSample, PyTree

Logits = Float[Array, "b *dims"]
DISC_LOSSES = ("hinge", "vanilla")
MAX_ADAPTIVE_WEIGHT = 1e4


def discriminator_loss(
    real: Logits, fake: Logits, weight: PerSample | None = None, *, disc_loss: str = "hinge"
) -> Float[Array, ""]:
    """Compute what the discriminator minimises: (mean f(-real) + mean f(fake)) / 2.

    f(x) is max(0, 1 + x) for "hinge" and log(1 + exp(x)) for "vanilla". Means are over the logits
    of a sample, then over samples with `weight` [b] (0 for padding; None for equal weights).
    Returns float32. Raises ValueError for another disc_loss.
    Source: taming-transformers, hinge_d_loss, vanilla_d_loss, hinge_d_loss_with_exemplar_weights.
    """
    check_choice("disc_loss", disc_loss, DISC_LOSSES)
    f = (lambda x: jax.nn.relu(1.0 + x)) if disc_loss == "hinge" else jax.nn.softplus
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    return 0.5 * (mean_logit(f(-real), weight) + mean_logit(f(fake), weight))


def generator_loss(fake: Logits, weight: PerSample | None = None) -> Float[Array, ""]:
    """Compute what the generator minimises, with either loss of the discriminator: -mean(fake)."""
    return -mean_logit(fake, weight)


def mean_logit(logits: Logits, weight: PerSample | None = None) -> Float[Array, ""]:
    """Average the logits of a sample, then samples with `weight` [b], in float32."""
    return weighted_mean(sample_means(logits.astype(jnp.float32)), weight)


def adaptive_weight(nll_gradient: Array, g_gradient: Array) -> Float[Array, ""]:
    """Balance two losses by their gradients: |d nll / d L| / (|d g / d L| + 1e-4), at most 1e4.

    L is the last layer's kernel; norms are Euclidean, in float32. No gradient flows back.
    Source: Esser et al. 2021, "Taming Transformers", equation 7.
    """
    ratio = _norm(nll_gradient) / (_norm(g_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, MAX_ADAPTIVE_WEIGHT))


def leaf_at(tree: PyTree, path: Sequence[str]) -> Array:
    """Take the leaf of a nested dictionary at a path; ValueError with the names that are there."""
    for depth, name in enumerate(path):
        if not isinstance(tree, Mapping) or name not in tree:
            names = ", ".join(tree) if isinstance(tree, Mapping) else "an array"
            raise ValueError(
                f"last_layer = {tuple(path)} should be the path of a parameter: after "
                f"{'/'.join(path[:depth]) or 'the root'} comes {names}"
            )
        tree = tree[name]
    return tree


def _norm(gradient: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32))))
