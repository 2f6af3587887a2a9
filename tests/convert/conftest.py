"""Tiny networks with drawn parameters, and lists of released names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import unet_fixtures


def shapes(module, *inputs):
    """Shapes of a network's parameters; inputs: shapes of what it is called with."""
    ones = [jnp.ones(shape, dtype) for shape, dtype in inputs]
    return jax.eval_shape(lambda key: module.init(key, *ones)["params"], jax.random.key(0))


def drawn(tree):
    """Random numbers for every leaf of a tree of shapes."""
    stream = np.random.RandomState(0)
    return jax.tree.map(
        lambda leaf: stream.standard_normal(leaf.shape).astype(np.float32) * 0.2, tree
    )


@pytest.fixture(scope="session")
def draw():
    return drawn


@pytest.fixture(scope="session")
def same():
    """Whether two trees hold the same numbers under the same names."""

    def compare(one, two):
        assert jax.tree.structure(one) == jax.tree.structure(two)
        return jax.tree.all(jax.tree.map(np.array_equal, one, two))

    return compare


@pytest.fixture(scope="session")
def released():
    """Shapes of the released UNets, released(name, scan=False), and their lists of names."""
    from support.released_unets import released_shapes

    return released_shapes, unet_fixtures.read_names()


TINY = {
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "use_spatial_transformer": True,
    "transformer_depth": (1, 2),
    "num_heads": 4,
    "context_dim": 24,
}


@pytest.fixture(scope="session")
def unet():
    """Make the shapes of a tiny UNet: unet(channels of x, **fields)."""
    from diffusion_jax.models.unet.unet import UNet

    @functools.cache
    def make(channels=4, **fields):
        module = UNet(**TINY | fields)
        f32, context = jnp.float32, (1, 3, module.context_dim)
        inputs = [((1, 8, 8, channels), f32), ((1,), f32), (context, f32)]
        if module.num_classes == "sequential":
            inputs.append(((1, module.adm_in_channels), f32))
        return shapes(module, *inputs)

    return make


@pytest.fixture(scope="session")
def vae():
    """Shapes of a tiny autoencoder, attending at one level: vae(**fields)."""
    from diffusion_jax.models.first_stage.autoencoder import Autoencoder

    @functools.cache
    def make(**fields):
        options = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16}
        options |= {"attn_resolutions": (8,)} | fields
        return shapes(Autoencoder(**options), ((1, 16, 16, 3), jnp.float32))

    return make


@pytest.fixture(scope="session")
def text():
    """Shapes of a tiny CLIP text tower with a projection."""
    from diffusion_jax.models.conditioning.clip import ClipTextTower

    tower = ClipTextTower(16, 2, 2, 32, projection_dim=8, vocab_size=11, max_length=5)
    return shapes(tower, ((1, 5), jnp.int32))


@pytest.fixture(scope="session")
def vision():
    """Shapes of a tiny CLIP vision tower."""
    from diffusion_jax.models.conditioning.clip import ClipVisionTower

    tower = ClipVisionTower(16, 1, 2, 32, projection_dim=8, image_size=8, patch_size=4)
    return shapes(tower, ((1, 8, 8, 3), jnp.float32))
