"""The UNet against released parameter lists, recorded outputs of diffusers, and its own options."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import unet_fixtures as fixtures
from support.released_unets import abstract_params, released_shapes

from diffusion_jax.models.layers.transformer import stack_blocks
from diffusion_jax.models.unet.unet import UNet

COUNTS = {
    "sd1_v1-inference": 859_520_964,
    "ldm_txt2img-1p4B-eval": 872_300_484,
    "sd21": 865_910_724,
    "sd2_v2-inpainting-inference": 865_925_124,
    "sd2_x4-upscaling": 473_398_020,
    "sdxl_base": 2_567_463_684,
    "sdxl_refiner": 2_259_526_660,
    "ldm_cin256-v2": 400_920_579,
    "imagenet_f8": 407_307_012,
    "toy_mnist_cond": 2_600_705,
}
# Families that differ from these in the first layer only.
DEFAULT = ("sd1_v1-inference", "sd21", "sdxl_base", "sdxl_refiner", "sd2_x4-upscaling")
TINY = fixtures.COMMON | {"attention_resolutions": (1,), "num_heads": 4}
TRANSFORMER = fixtures.TRANSFORMER
ONE_LEVEL = TINY | {"channel_mult": (1,)}


def drawn_params(module, channels=3):
    """The numbers that diffusers was given, in our tree."""

    def draw(path, leaf):
        name, shape = fixtures.released_name(path, leaf.shape)
        return jnp.asarray(fixtures.to_ours(fixtures.numbers(name, shape), path[-1].key))

    return jax.tree_util.tree_map_with_path(draw, abstract_params(module, channels))


def relative(ours, theirs, floor=0.0):
    """Largest difference, relative to the largest number (or the floor)."""
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), floor)


def compiled(function):
    """Compile with little optimisation: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def forward(fields, params=None, **changed):
    """Run a network on the drawn inputs, some of them changed."""
    drawn = fixtures.inputs(fixtures.CASES["conv_projection"]) | {"context": None} | changed
    arguments = {k: drawn[k] for k in ("x", "t", "context", "y")}
    arguments = jax.tree.map(jnp.asarray, arguments)
    module = UNet(**fields)
    params = drawn_params(module, arguments["x"].shape[-1]) if params is None else params
    return compiled(module.apply)({"params": params}, **arguments)


def recorded(name):
    """What diffusers computed for a case."""
    with np.load(fixtures.FIXTURES / "unet_diffusers.npz") as arrays:
        return {k.split("/")[1]: arrays[k] for k in arrays if k.startswith(f"{name}/")}


@pytest.mark.parametrize(
    "name",
    [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in COUNTS],
)
def test_names_shapes_and_counts_are_the_released_ones(name):
    tree = released_shapes(name)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    ours = dict(fixtures.released_name(path, leaf.shape) for path, leaf in leaves)
    assert ours == fixtures.read_names()[name]
    assert sum(leaf.size for _, leaf in leaves) == COUNTS[name]


WITH_GRADIENTS = ("linear_projection_depth_2", "attention_block")


@pytest.mark.parametrize("name", [name for name in fixtures.CASES if name not in WITH_GRADIENTS])
def test_output_is_that_of_diffusers(name):
    case = fixtures.CASES[name]
    drawn = fixtures.inputs(case)
    output = forward(case.fields, context=drawn["context"], y=drawn["y"])
    assert relative(output, recorded(name)["output"]) < 1e-5


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_output_and_gradients_are_those_of_diffusers(name):
    case = fixtures.CASES[name]
    module, drawn = UNet(**case.fields), fixtures.inputs(case)
    drawn = {k: v if v is None else jnp.asarray(v) for k, v in drawn.items()}

    def loss(params, x):
        output = module.apply({"params": params}, x, drawn["t"], drawn["context"], drawn["y"])
        return jnp.sum(output * drawn["cotangent"]), output

    gradient = compiled(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, x_grad), output = gradient(drawn_params(module), drawn["x"])
    theirs = recorded(name)
    assert relative(output, theirs["output"]) < 1e-5
    assert relative(x_grad, theirs["x"]) < 1e-4
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    ours = {fixtures.released_name(p, leaf.shape)[0]: (leaf, p[-1].key) for p, leaf in leaves}
    for released in fixtures.RECORDED:
        leaf, kind = ours[released]
        assert relative(leaf, fixtures.to_ours(theirs[released], kind)) < 1e-4, released


def test_a_new_network_returns_zero():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    output, _ = compiled(UNet(**ONE_LEVEL).init_with_output)(jax.random.key(1), x, jnp.zeros(2))
    assert output.shape == x.shape and not output.any()


@pytest.mark.slow
def test_remat_and_scan_reach_every_block():
    fields = TRANSFORMER | {"channel_mult": (1,), "transformer_depth": 2}
    plain, changed = UNet(**fields), UNet(**fields, remat=True, scan=True)
    shapes = abstract_params(plain, 3)
    assert jax.tree.structure(abstract_params(UNet(**fields, remat=True), 3)) == jax.tree.structure(
        shapes
    )
    assert jax.eval_shape(stack_blocks, shapes) == abstract_params(changed, 3)
    params, context = drawn_params(plain), fixtures.numbers("context", (2, 5, 24))
    ours = forward(fields | {"remat": True, "scan": True}, stack_blocks(params), context=context)
    np.testing.assert_allclose(ours, forward(fields, params, context=context), rtol=1e-4, atol=1e-5)
    x, t = jnp.ones((2, 8, 8, 3)), jnp.ones(2)
    program = jax.make_jaxpr(changed.apply)({"params": stack_blocks(params)}, x, t, context)
    # 5 residual blocks, and 4 stacks of transformer blocks
    assert str(program).count("checkpoint[") + str(program).count("remat2[") == 9


def test_patches_become_channels_and_pixels_again():
    fields = ONE_LEVEL | {"patch_size": 2}
    x = fixtures.numbers("patches", (2, 16, 16, 3))
    output = forward(fields, x=x)
    assert output.shape == x.shape
    # The same network on the patches themselves, whose channels run (row, column, channel).
    squares = x.reshape(2, 8, 2, 8, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 12)
    params = drawn_params(UNet(**fields))
    inside = forward(ONE_LEVEL | {"out_channels": 12}, params=params, x=squares)
    back = inside.reshape(2, 8, 8, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
    np.testing.assert_allclose(output, back, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_output():
    half = ONE_LEVEL | {"dtype": jnp.bfloat16}
    shapes = abstract_params(UNet(**half), 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    exact, rounded = forward(ONE_LEVEL), forward(half)
    assert rounded.dtype == jnp.float32
    assert 0 < relative(rounded, np.asarray(exact)) < 0.05


def test_dropout_needs_train_and_its_key():
    module = UNet(**ONE_LEVEL | {"dropout": 0.5})
    params = {"params": drawn_params(module)}
    x, t = jnp.ones((1, 8, 8, 3)), jnp.ones(1)
    still = compiled(module.apply)(params, x, t)

    @compiled
    def run(key):
        return module.apply(params, x, t, train=True, rngs={"dropout": key})

    first, second, again = (run(jax.random.key(seed)) for seed in (0, 1, 1))
    assert not jnp.allclose(first, still) and not jnp.allclose(first, second)
    np.testing.assert_array_equal(second, again)
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(lambda x: module.apply(params, x, t, train=True), x)


def test_codebook_head_returns_logits():
    assert forward(ONE_LEVEL | {"n_embed": 17}).shape == (2, 8, 8, 17)


def test_middle_without_attention_keeps_its_names():
    tree = abstract_params(UNet(**TINY | {"disable_middle_transformer": True}), 3)
    assert "middle_block_1" not in tree and "middle_block_2" in tree


def test_num_attention_blocks_counts_from_the_first():
    fields = TINY | {"num_res_blocks": (2, 1), "num_attention_blocks": (1, 0)}
    tree = abstract_params(UNet(**fields | {"attention_resolutions": (1, 2)}), 3)
    blocks = [name for name, child in tree.items() if "qkv" in child]
    # Up from the middle, level 1 has output blocks 0 and 1, level 0 has 2, 3 and 4.
    assert blocks == ["input_blocks_1_1", "middle_block_1", "output_blocks_2_1"]


@pytest.mark.parametrize(("legacy", "inner"), [(False, 48), (True, 64)])
def test_legacy_rule_for_heads_that_do_not_fill_the_channels(legacy, inner):
    fields = TRANSFORMER | {"attention_resolutions": (2,), "num_head_channels": 48}
    tree = abstract_params(UNet(**fields | {"legacy": legacy}), 3)
    assert tree["middle_block_1"]["proj_in"]["kernel"].shape == (1, 1, 64, inner)


def test_heads_of_the_way_up():
    fields = ONE_LEVEL | {"num_heads": 1}
    params = drawn_params(UNet(**fields))
    x = fixtures.numbers("x", (2, 8, 8, 3))
    one, two = (forward(fields | {"num_heads_upsample": n}, params=params, x=x) for n in (-1, 2))
    assert not jnp.allclose(one, two, atol=1e-3)


BAD_FIELDS = {
    "num_res_blocks = (1, 2, 3) has 3 entries; give 2": {"num_res_blocks": (1, 2, 3)},
    "disable_self_attentions = (True,) has 1 entries; give 2": {"disable_self_attentions": (True,)},
    "num_attention_blocks = (1,) has 1 entries; give 2": {"num_attention_blocks": (1,)},
    "attention_resolutions = (16,) names no level": {"attention_resolutions": (16,)},
    "channel_mult is empty": {"channel_mult": ()},
    "patch_size = 0 should be at least 1": {"patch_size": 0},
    "num_heads = -1 should be at least 1": {"num_heads": -1},
    "num_heads = 5 does not divide the 32 channels": {"num_heads": 5},
    "num_head_channels = 24 does not divide the 32 channels": {"num_head_channels": 24},
    "num_head_channels = 99 does not divide": {
        "num_head_channels": 99,
        "use_spatial_transformer": True,
    },
    "context_dim = 24 needs use_spatial_transformer": {"context_dim": 24},
    "so transformer_depth = 1 should be 2": {
        "context_dim": (24, 32),
        "use_spatial_transformer": True,
    },
    "num_classes = 'labels' is unknown; give the number of classes, None or one of continuous": {
        "num_classes": "labels"
    },
    "num_classes = 0 should be at least 1": {"num_classes": 0},
    "needs adm_in_channels": {"num_classes": "sequential"},
    "num_groups = 12 does not divide the 32 channels of input_blocks_1_0/in_layers_0": {
        "num_groups": 12
    },
    "remat = 'some' is unknown; choose True, False or one of": {"remat": "some"},
    "attention_impl = 'fast' is unknown; choose one of auto, xla, cudnn": {
        "attention_impl": "fast"
    },
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_fields_that_do_not_fit_are_named(message):
    module = UNet(**TINY | BAD_FIELDS[message])
    with pytest.raises(ValueError) as error:
        jax.eval_shape(
            lambda key: module.init(key, jnp.ones((1, 8, 8, 3)), jnp.ones(1)), jax.random.key(0)
        )
    assert message in str(error.value)


X = jnp.ones((2, 8, 8, 3))
BAD_INPUTS = {
    "x is 7 x 8 pixels; both should be multiples of 2": (TINY, {"x": jnp.ones((2, 7, 8, 3))}),
    "context is given and context_dim = None": (TINY, {"x": X, "context": jnp.ones((2, 5, 24))}),
    "context is missing and context_dim = 24": (TRANSFORMER, {"x": X}),
    "context 0 has width 23; context_dim needs 24": (
        TRANSFORMER,
        {"x": X, "context": jnp.ones((2, 5, 23))},
    ),
    "got 2 contexts; give 1 for all blocks or 1": (
        TRANSFORMER,
        {"x": X, "context": (jnp.ones((2, 5, 24)), jnp.ones((2, 5, 24)))},
    ),
    "y (2,) is given and num_classes = None": (TINY, {"x": X, "y": jnp.ones(2)}),
    "y is missing and num_classes = 10": (TINY | {"num_classes": 10}, {"x": X}),
    "y has shape (2, 3); num_classes = 10 needs (2,)": (
        TINY | {"num_classes": 10},
        {"x": X, "y": jnp.ones((2, 3), jnp.int32)},
    ),
    "y has shape (2, 3); num_classes = 'sequential' needs (2, 4)": (
        TINY | {"num_classes": "sequential", "adm_in_channels": 4},
        {"x": X, "y": jnp.ones((2, 3))},
    ),
    "y is float32; labels should be integers": (
        TINY | {"num_classes": 10},
        {"x": X, "y": jnp.ones(2)},
    ),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_named(message):
    fields, arguments = BAD_INPUTS[message]
    module = UNet(**fields)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda key: module.init(key, t=jnp.ones(2), **arguments), jax.random.key(0))
    assert message in str(error.value)


def test_numbers_that_a_network_does_not_read_are_refused():
    drawn = fixtures.inputs(fixtures.CASES["conv_projection"])
    x, t, number = (jnp.asarray(drawn[name]) for name in ("x", "t", "t"))
    init = lambda module, **named: jax.eval_shape(
        lambda: module.init(jax.random.key(0), x, t, **named)
    )
    fields = (("embeds_duration", "duration", True), ("time_cond_proj_dim", "guidance", 8))
    for field, name, value in fields:
        with pytest.raises(ValueError, match=f"{name} is given and {field} = "):
            init(UNet(**ONE_LEVEL), **{name: number})
        init(UNet(**ONE_LEVEL, **{field: value}), **{name: number})
