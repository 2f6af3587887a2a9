"""The UNet of several views against released lists, and what it tells of its inputs."""

import jax
import jax.numpy as jnp
import pytest
from support import unet_fixtures, video_fixtures
from support.released_unets import MULTIVIEW, multiview_shapes

from diffusion_jax.convert.weights.names import file_tensors
from diffusion_jax.models.layers.transformer import stack_blocks
from diffusion_jax.models.unet.multiview_unet import MultiviewUNet

COUNTS = {"sv4d": 1_996_625_322, "sv4d2": 2_010_961_338}
TINY = {
    name: fields
    | {
        "model_channels": 32,
        "channel_mult": (1,),
        "num_res_blocks": 0,
        "attention_resolutions": (1,),
        "num_head_channels": 16,
        "context_dim": 24,
        "adm_in_channels": 6,
    }
    for name, fields in MULTIVIEW.items()
}
INPUTS = {
    "x": jnp.asarray(unet_fixtures.numbers("x", (1, 6, 8, 8, 8))),
    "t": jnp.array([0.5]),
    "context": jnp.asarray(unet_fixtures.numbers("context", (1, 2, 1, 24))),
    "y": jnp.asarray(unet_fixtures.numbers("y", (1, 6, 6))),
    "cond_view": jnp.asarray(unet_fixtures.numbers("view", (1, 3, 8, 8, 4))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_names_shapes_and_counts_are_the_released_ones(name):
    tree = multiview_shapes(MultiviewUNet(**MULTIVIEW[name]))
    ours = {tensor.name: tensor.shape for tensor in file_tensors(tree, "unet_ldm")}
    assert ours == unet_fixtures.read_names()[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == COUNTS[name]


@pytest.mark.parametrize("name", [pytest.param("sv4d", marks=pytest.mark.slow), "sv4d2"])
def test_names_are_released_ones_and_every_input_reaches_every_frame(name):
    module = MultiviewUNet(**TINY[name])
    shapes = multiview_shapes(module)
    middle = {t.name for t in file_tensors(shapes, "unet_ldm") if t.name.startswith("middle")}
    assert middle == {n for n in unet_fixtures.read_names()[name] if n.startswith("middle")}
    with pytest.raises(ValueError, match="networks of several views .* have no place in diffusers"):
        file_tensors(shapes, "unet_diffusers")
    params = video_fixtures.drawn_of(shapes)

    run = jax.jit(
        lambda inputs: module.apply({"params": params}, **inputs),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    plain = run(INPUTS)
    assert plain.shape == (1, 6, 8, 8, 4)
    moved = {
        "x": INPUTS["x"].at[0, 4].add(1.0),
        "context": INPUTS["context"].at[0, 1].add(1.0),
        "y": INPUTS["y"].at[0, 0].add(1.0),
        "cond_view": INPUTS["cond_view"].at[0, 2].add(1.0),
    }
    for input_name, array in moved.items():
        change = jnp.abs(run(INPUTS | {input_name: array}) - plain).max((0, 2, 3, 4))
        assert change.min() > 1e-4, (input_name, change)


def test_scanned_blocks_keep_their_names():
    plain, scanned = (
        multiview_shapes(MultiviewUNet(**TINY["sv4d2"] | {"transformer_depth": 2, "scan": scan}))
        for scan in (False, True)
    )
    assert jax.eval_shape(stack_blocks, plain) == scanned
    names = [{t.name: t.shape for t in file_tensors(t, "unet_ldm")} for t in (plain, scanned)]
    assert names[0] == names[1]
    assert "middle_block.1.motion_blocks.1.attn1.to_q.weight" in names[1]


BAD = {
    "context is missing": {"context": None},
    "cond_view is missing; a network of several views needs it": {"cond_view": None},
    "x has 6 frames, and context 2 times and cond_view 2 views; x should have 4": {
        "cond_view": INPUTS["cond_view"][:, :2]
    },
    "cond_view has 3 channels; motion_context_dim should be the same and is 4": {
        "cond_view": INPUTS["cond_view"][..., :3]
    },
    "y is for 5 frames, and x has 6": {"y": INPUTS["y"][:, :5]},
    "context 0 has width 23; context_dim needs 24": {"context": INPUTS["context"][..., :23]},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    module = MultiviewUNet(**TINY["sv4d"])
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda key: module.init(key, **INPUTS | BAD[message]), jax.random.key(0))
    assert message in str(error.value)
