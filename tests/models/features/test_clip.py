"""CLIP as a feature network: which tower a file holds, and how images reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioning.clip import ClipTextTower, ClipVisionTower
from diffusion_jax.models.features import clip


def test_the_tower_is_known_by_its_width_and_positions():
    tower = clip.tower_of(1024, 1 + 24 * 24)
    assert (tower.num_layers, tower.image_size) == (24, clip.CMMD_SIZE)
    beside = clip.text_tower_beside(clip.tower_of(1280, 257))
    assert (beside.width, beside.num_layers, beside.projection_dim) == (1024, 24, 1024)


def test_shapes_fit_together():
    small = dict(width=64, num_layers=1, num_heads=1, mlp_dim=64, projection_dim=24)
    tower = ClipVisionTower(**small, image_size=28)
    params = clip.abstract_params(tower)
    image = jax.ShapeDtypeStruct((2, 20, 20, 3), jnp.float32)
    found = jax.eval_shape(lambda p, x: clip.features(p, x, tower=tower), params, image)
    assert found.shape == (2, 24)
    text = ClipTextTower(**small, vocab_size=50)
    params = clip.abstract_text_params(text)
    tokens = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    found = jax.eval_shape(lambda p, t: clip.text_features(p, t, tower=text), params, tokens)
    assert found.shape == (2, 24)


def test_another_width_is_said():
    with pytest.raises(ValueError, match="of width 512 is unknown; choose from ViT-L-14"):
        clip.tower_of(512, 50)


def test_images_come_normalised(monkeypatch):
    seen = []

    def apply(self, variables, image):
        seen.append(image)
        return type("States", (), {"projected": jnp.zeros((2, 4))})

    monkeypatch.setattr(ClipVisionTower, "apply", apply)
    clip.features({}, jnp.full((2, 9, 9, 3), 255.0), tower=ClipVisionTower(image_size=28))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(seen[0][1, 5, 5], (1 - mean) / std, rtol=1e-5)
