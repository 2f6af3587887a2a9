"""The noise that training adds: offset, coarser grids beside the pixels, and perturbed inputs."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from diffusion_jax.diffusion.losses import offset_noise, pyramid_noise
from diffusion_jax.randomness import noise_like
from diffusion_jax.types import Keys


class NoiseOptions(NamedTuple):
    """What is added to plain noise; by default nothing.

    offset_noise_level: how much of the noise all pixels of a channel share, see
    losses.offset_noise. pyramid_noise_discount: how much less noise each coarser grid adds than the
    one before, 0 for no such grids, see losses.pyramid_noise. pyramid_noise_levels: how many
    coarser grids there are at most. input_perturbation: in training the network sees so much more
    noise than it is asked for, see draw_noise.
    """

    offset_noise_level: float = 0.0
    pyramid_noise_discount: float = 0.0
    pyramid_noise_levels: int = 6
    input_perturbation: float = 0.0


PLAIN = NoiseOptions()


def check_noising(options: NoiseOptions) -> None:
    """Raise ValueError for a number out of range."""
    for name in ("offset_noise_level", "input_perturbation"):
        value = getattr(options, name)
        if not value >= 0.0:
            raise ValueError(f"{name} = {value!r} should be at least 0")
    if not 0.0 <= options.pyramid_noise_discount <= 1.0:
        raise ValueError(
            f"pyramid_noise_discount = {options.pyramid_noise_discount!r} should be between 0 and 1"
        )
    if options.pyramid_noise_levels < 1:
        raise ValueError(
            f"pyramid_noise_levels = {options.pyramid_noise_levels!r} should be at least 1"
        )


def draw_noise(
    keys: Keys, others: Keys, shape: tuple[int, ...], options: NoiseOptions
) -> tuple[Float[Array, "b *shape"], Float[Array, "b *shape"]]:
    """Draw the noise of each sample, and the noise in what the network sees of it, float32.

    Without options both are the same standard normal noise of keys; others are for what is added.
    The targets of the network follow from the first, so that with input_perturbation it learns to
    correct an input that is not quite what it should be, as happens in sampling.
    Source of it: Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models".
    """
    noise = noise_like(keys, shape)
    alone = options.pyramid_noise_discount == 0.0 and options.input_perturbation == 0.0
    # An offset alone draws from its key undivided, as it did before there were others.
    split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)
    pyramids, offsets, perturbations = (others,) * 3 if alone else split(others)
    if options.pyramid_noise_discount > 0.0:
        how = options.pyramid_noise_discount, options.pyramid_noise_levels
        noise = pyramid_noise(noise, pyramids, *how)
    if options.offset_noise_level > 0.0:
        noise = offset_noise(noise, offsets, options.offset_noise_level)
    if options.input_perturbation == 0.0:
        return noise, noise
    return noise, noise + options.input_perturbation * noise_like(perturbations, shape)
