"""The random numbers of drawn images: one seed for all, or one for each, and variations of them."""

import logging
import secrets
from collections.abc import Container, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from diffusion_jax.diffusion.samplers.variation import Variation
from diffusion_jax.randomness import sample_keys, seed_key
from diffusion_jax.runs.inputs.arrays import Number, Whole, number, whole_number
from diffusion_jax.types import Keys

_log = logging.getLogger(__name__)

# One for all images, whose number i is drawn from (seed, i); or one for each, as its number 0.
Seed: TypeAlias = Whole | Sequence[Whole]


class Seeds(NamedTuple):
    """Seeds that were checked. variation: seeds to go towards, strength: how far, in [0, 1]."""

    seed: int | tuple[int, ...]
    variation: int | tuple[int, ...] | None = None
    strength: float = 0.0

    def keys(self, rows: np.ndarray) -> Keys:
        """Make the keys of the images with these numbers."""
        return _keys(self.seed, rows)

    def varied(self, rows: np.ndarray) -> dict[str, Variation]:
        """Make what sample_fn takes as `variation` for the images with these numbers."""
        if self.variation is None:
            return {}
        strength = jnp.full(len(rows), self.strength, jnp.float32)
        return {"variation": Variation(_keys(self.variation, rows), strength)}

    def images_of(self, conditions: Any, n: Whole | None = None) -> Whole | None:
        """Tell how many images one condition for all has: n, or as many as there are seeds.

        None where neither says it.
        """
        given = [seed for seed in (self.seed, self.variation) if isinstance(seed, tuple)]
        alone = n is None and isinstance(conditions, str | int | None)
        return len(given[0]) if given and alone else n

    def of_image(self, index: int) -> tuple[int, int]:
        """Tell the seed of an image, and which of its images it is."""
        return (self.seed, index) if isinstance(self.seed, int) else (self.seed[index], 0)

    def facts(self, index: int) -> dict[str, int | float]:
        """Say of an image what AUTOMATIC1111's web interface does of a variation."""
        if self.variation is None:
            return {}
        one = self.variation
        other = one if isinstance(one, int) else one[index]
        return {"Variation seed": other, "Variation seed strength": self.strength}

    def alone(self) -> int:
        """Return the seed of a model that draws views of a video, which has only one."""
        if not isinstance(self.seed, int) or self.variation is not None:
            raise ValueError(
                f"seed = {self.seed} and variation_seed = {self.variation} do not fit: this model "
                "draws views of a video, which share one seed"
            )
        return self.seed

    def check(self, count: int, given: Container[str]) -> None:
        """Raise ValueError unless there is one seed for all of `count` images or for each.

        given: names of arrays of a call, whose noise cannot be varied.
        """
        for name in ("noise", "step_noise"):
            if self.variation is not None and name in given:
                raise ValueError(
                    f"variation_seed goes with seed, and {name} is given instead of it"
                )
        for name, seed in (("seed", self.seed), ("variation_seed", self.variation)):
            if isinstance(seed, tuple) and len(seed) != count:
                raise ValueError(
                    f"{name} = {list(seed)} should have one number for each image, and there "
                    f"are {count}"
                )


def check_seeds(
    seed: Seed | None,
    variation_seed: Seed | None = None,
    variation_strength: Number | None = None,
) -> Seeds:
    """Check the seeds of a call. None as the seed draws one, and the log says which.

    At strength 0 there is no variation, and at 1 the images are the ones of variation_seed. Raises
    ValueError for what is no whole number, a strength outside [0, 1], and one without the other.
    """
    if (variation_seed is None) != (variation_strength is None):
        given = "variation_seed" if variation_strength is None else "variation_strength"
        lacking = "variation_strength" if variation_strength is None else "variation_seed"
        raise ValueError(f"{given} needs {lacking} beside it")
    if variation_seed is None or variation_strength is None:
        return Seeds(_checked("seed", seed))
    strength = number("variation_strength", variation_strength)
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"variation_strength = {strength} should be between 0 and 1")
    own, other = _checked("seed", seed), _checked("variation_seed", variation_seed)
    if strength in (0.0, 1.0):
        return Seeds(own if strength == 0.0 else other)
    return Seeds(own, other, strength)


def read_seeds(given: Seed | str, flag: str) -> Seed:
    """Read a seed out of a text, or several with commas between them.

    Raises ValueError for another text.
    """
    if not isinstance(given, str):
        return given
    try:
        found = [int(part) for part in given.split(",")]
    except ValueError as error:
        raise ValueError(f"{flag}={given} should be a whole number, or a list: 1,2,3") from error
    return found if "," in given else found[0]


def checked_seed(seed: Whole | None) -> int:
    """Check a seed, or draw one and say which."""
    if seed is None:
        seed = secrets.randbits(32)
        _log.warning("seed = %d was drawn", seed)
    return whole_number("seed", seed)


def _checked(name: str, seed: Any) -> int | tuple[int, ...]:
    several = isinstance(seed, list | tuple) or (hasattr(seed, "ndim") and np.ndim(seed) == 1)
    if several:
        if not len(seed):
            raise ValueError(f"{name} = {seed!r} should be a whole number, or one for each image")
        return tuple(whole_number(name, one) for one in seed)
    return checked_seed(seed) if name == "seed" else whole_number(name, seed)


def _keys(seed: int | tuple[int, ...], rows: np.ndarray) -> Keys:
    if isinstance(seed, int):
        return sample_keys(seed_key(seed), jnp.asarray(rows))
    first = jnp.zeros(1, jnp.int32)
    return jnp.concatenate([sample_keys(seed_key(seed[row]), first) for row in rows])
