"""CLIP as a feature network: images [b h w 3] and texts -> projected embeddings [b d]."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion_jax.models.conditioning.clip import (
    ClipTextTower,
    ClipVisionTower,
    text_tower,
    vision_tower,
)
from diffusion_jax.models.conditioning.text_embedders import CLIP_MEAN, CLIP_STD
from diffusion_jax.models.features.layers import resize
from diffusion_jax.types import PyTree

NAME = "clip"
# Width of a tower -> its name.
_TOWERS = {1024: "ViT-L-14", 1280: "ViT-H-14"}
# The tower of the CMMD has this image size.
CMMD_SIZE = 336


def tower_of(width: int, positions: int) -> ClipVisionTower:
    """Make the released tower of a width, for the image size of its positions.

    Raises ValueError for a width of no released tower.
    """
    if width not in _TOWERS:
        raise ValueError(
            f"a CLIP image tower of width {width} is unknown; choose from "
            f"{', '.join(f'{name} ({size})' for size, name in _TOWERS.items())}"
        )
    tower = vision_tower(_TOWERS[width])
    return tower.clone(image_size=round((positions - 1) ** 0.5) * tower.patch_size)


def abstract_params(tower: ClipVisionTower) -> PyTree:
    """Find the shapes of a tower's parameters."""
    image = jax.ShapeDtypeStruct((1, tower.image_size, tower.image_size, 3), jnp.float32)
    return jax.eval_shape(tower.init, jax.random.key(0), image)["params"]


def features(
    params: PyTree, images: Float[Array, "b h w 3"], *, tower: ClipVisionTower
) -> Float[Array, "b d"]:
    """Compute the projected embeddings of images with values in [0, 255]."""
    x = resize(images, tower.image_size, "bicubic") / 255.0
    mean, std = (jnp.asarray(a, jnp.float32)[None, None, None] for a in (CLIP_MEAN, CLIP_STD))
    states: Any = tower.apply({"params": params}, (x - mean) / std)
    return states.projected


def text_tower_beside(tower: ClipVisionTower) -> ClipTextTower:
    """Make the text tower that was trained with a released image tower."""
    return text_tower(_TOWERS[tower.width], projection_dim=tower.projection_dim)


def abstract_text_params(tower: ClipTextTower) -> PyTree:
    """Find the shapes of a text tower's parameters."""
    tokens = jax.ShapeDtypeStruct((1, tower.max_length), jnp.int32)
    return jax.eval_shape(tower.init, jax.random.key(0), tokens)["params"]


def text_features(
    params: PyTree, tokens: Int[Array, "b l"], *, tower: ClipTextTower
) -> Float[Array, "b d"]:
    """Compute the projected embeddings of texts."""
    states: Any = tower.apply({"params": params}, tokens)
    return states.projected
