"""The order of a UNet's blocks, and what is chosen for each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.unet.skeleton import (
    Blocks,
    attends,
    embed_timesteps,
    heads_of,
    run_blocks,
    transformer_fields,
)
from diffusion_jax.models.unet.unet import UNet


def options(**fields):
    return UNet(**{"out_channels": 3, "channel_mult": (1, 2), "num_res_blocks": 1} | fields)


def test_blocks_run_in_the_order_of_the_released_names():
    """The names of a network with resblock_updown, which has no other layers between the blocks."""
    called = []

    def residual(h, channels, name, up=False, down=False):
        called.append((name, h.shape[-1], channels, up, down))
        side = h.shape[1] * 2 if up else h.shape[1] // 2 if down else h.shape[1]
        return jnp.zeros((1, side, side, channels))

    def attend(h, level, name, up):
        called.append((name, level, up))
        return h

    chosen = options(resblock_updown=True, attention_resolutions=(2,), model_channels=8)
    out = run_blocks(chosen, jnp.zeros((1, 4, 4, 8)), Blocks(residual, attend))
    assert out.shape == (1, 4, 4, 8)
    assert called == [
        ("input_blocks_1_0", 8, 8, False, False),
        ("input_blocks_2_0", 8, 8, False, True),
        ("input_blocks_3_0", 8, 16, False, False),
        ("input_blocks_3_1", 1, False),
        ("middle_block_0", 16, 16, False, False),
        ("middle_block_1", None, False),
        ("middle_block_2", 16, 16, False, False),
        ("output_blocks_0_0", 32, 16, False, False),
        ("output_blocks_0_1", 1, True),
        ("output_blocks_1_0", 24, 16, False, False),
        ("output_blocks_1_1", 1, True),
        ("output_blocks_1_2", 16, 16, True, False),
        ("output_blocks_2_0", 24, 8, False, False),
        ("output_blocks_3_0", 16, 8, False, False),
    ]


@pytest.mark.parametrize(
    ("fields", "channels", "up", "wanted"),
    [
        ({"num_heads": 4}, 64, False, (4, 16)),
        ({"num_heads": 4, "num_heads_upsample": 8}, 64, True, (8, 8)),
        ({"num_heads": 4, "num_heads_upsample": 8}, 64, False, (4, 16)),
        ({"num_head_channels": 48}, 64, False, (1, 48)),
        ({"num_head_channels": 48, "legacy": True}, 64, False, (1, 64)),
    ],
)
def test_heads(fields, channels, up, wanted):
    assert heads_of(options(**fields), channels, up) == wanted


def test_attention_follows_the_first_blocks_of_its_levels():
    chosen = options(attention_resolutions=(2,), num_attention_blocks=(5, 1))
    assert [attends(chosen, level, i) for level in (0, 1) for i in (0, 1)] == [
        *(False, False),
        *(True, False),
    ]


def test_the_middle_transformer_is_like_the_last_level():
    chosen = options(
        transformer_depth=(1, 3),
        disable_self_attentions=(True, False),
        disable_middle_self_attn=True,
    )
    levels = [transformer_fields(chosen, 64, level, 0.1, False) for level in (0, 1, None)]
    assert [fields["depth"] for fields in levels] == [1, 3, 3]
    assert [fields["disable_self_attn"] for fields in levels] == [True, False, True]
    assert {fields["dropout"] for fields in levels} == {0.1}


class Embedding(nn.Module):
    """The embedding of t and of what else a network reads."""

    fields: dict

    @nn.compact
    def __call__(self, t, **numbers):
        return embed_timesteps(options(model_channels=8, **self.fields), t, **numbers)


@pytest.mark.parametrize(
    ("fields", "name", "layer", "default"),
    [
        ({"embeds_duration": True}, "duration", "duration_embed_2", 0.0),
        ({"time_cond_proj_dim": 6}, "guidance", "time_embed_cond_proj", 1.0),
    ],
)
def test_numbers_beside_t_are_embedded(fields, name, layer, default):
    t, module = jnp.asarray([7.0, 613.0]), Embedding(fields)
    params = jax.jit(module.init)(jax.random.key(0), t)["params"]
    if name == "duration":  # a network begins as one that does not read it
        own = {key: leaf for key, leaf in params.items() if not key.startswith("duration")}
        wanted = Embedding({}).apply({"params": own}, t)
        given = {name: jnp.asarray([5.0, 9.0])}
        np.testing.assert_array_equal(module.apply({"params": params}, t, **given), wanted)
    params[layer] = jax.tree.map(lambda leaf: leaf + 0.1, params[layer])
    found = module.apply({"params": params}, t, **{name: jnp.asarray([default, 9.0])})
    without = module.apply({"params": params}, t)
    np.testing.assert_allclose(found[0], without[0], rtol=1e-5, atol=1e-6)
    assert np.abs(found[1] - without[1]).max() > 1e-3
