"""The UNet of videos against released lists, recorded outputs of diffusers and the image UNet."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import unet_fixtures, video_fixtures
from support.released_unets import VIDEO, video_shapes

from diffusion_jax.convert.weights.names import file_tensors
from diffusion_jax.devices.mesh import make_mesh, on_mesh
from diffusion_jax.models.layers.transformer import stack_blocks
from diffusion_jax.models.unet.unet import UNet
from diffusion_jax.models.unet.video_unet import VideoUNet, as_image_unet

COUNTS = {"svd": 1_524_623_082, "sv3d_u": 1_523_967_722, "sv3d_p": 1_525_278_442}
FIELDS = video_fixtures.FIELDS
# Three residual blocks and two transformers.
ONE_LEVEL = FIELDS | {"channel_mult": (1,), "transformer_depth": 1, "num_res_blocks": 0}


def compiled(function):
    """Compile with little optimisation: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def arguments(**changed):
    drawn = {k: jnp.asarray(v) for k, v in video_fixtures.inputs().items()} | changed
    return [drawn[name] for name in ("x", "t", "context", "y")]


@pytest.fixture(scope="module")
def params():
    return video_fixtures.drawn_params(VideoUNet(**ONE_LEVEL))


@functools.cache
def compiled_network(**fields):
    module = VideoUNet(**ONE_LEVEL | fields)
    return compiled(lambda p, *a, i: module.apply({"params": p}, *a, image_only_indicator=i))


def run(params, inputs=None, image_only=False, **fields):
    inputs = arguments() if inputs is None else inputs
    indicator = jnp.full(inputs[0].shape[:2], float(image_only))
    return compiled_network(**fields)(params, *inputs, i=indicator)


@pytest.mark.parametrize(
    "name", ["svd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sv3d_u", "sv3d_p"))]
)
def test_names_shapes_and_counts_are_the_released_ones(name):
    tree = video_shapes(VideoUNet(**VIDEO[name]))
    ours = {tensor.name: tensor.shape for tensor in file_tensors(tree, "unet_ldm")}
    assert ours == unet_fixtures.read_names()[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == COUNTS[name]


def test_output_is_that_of_diffusers():
    module = VideoUNet(**FIELDS)
    params = {"params": video_fixtures.drawn_params(module)}
    ours = compiled(module.apply)(params, *arguments())
    with np.load(video_fixtures.FIXTURE) as theirs:
        difference = np.abs(ours - theirs["output"]).max()
        assert difference < 1e-4 * np.abs(theirs["output"]).max()


@pytest.mark.slow
def test_gradients_are_those_of_diffusers():
    module = VideoUNet(**FIELDS)
    ours = video_fixtures.run_ours(module, video_fixtures.drawn_params(module))
    with np.load(video_fixtures.FIXTURE) as theirs:
        for name in ("output", "x", *video_fixtures.RECORDED):
            difference = np.abs(ours[name] - theirs[name]).max()
            assert difference < 1e-4 * np.abs(theirs[name]).max(), name


@pytest.mark.parametrize(
    ("kernel", "patch"),
    [((3, 1, 1), 1), ((3, 1, 1), 2), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_one_image_is_what_the_image_network_computes(kernel, patch):
    changed = {"video_kernel_size": kernel, "patch_size": patch}
    params = video_fixtures.drawn_params(VideoUNet(**ONE_LEVEL | changed))
    x, t, context, y = arguments()
    image = [x[:, 0], t, context, y]
    ours = run(params, [x[:, :1], *image[1:]], image_only=True, **changed)
    own, fields = set(UNet.__dataclass_fields__), ONE_LEVEL | {"patch_size": patch}
    module = UNet(use_spatial_transformer=True, **{k: fields[k] for k in own & set(fields)})
    spatial = without_time(params)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *image)["params"]
    assert jax.tree.structure(spatial) == jax.tree.structure(shapes)
    theirs = compiled(lambda p, *a: module.apply({"params": p}, *a))(spatial, *image)
    assert jnp.abs(theirs).max() > 0.1
    np.testing.assert_array_equal(ours[:, 0], theirs)


def without_time(params):
    """The parameters that an image network has, too."""
    if not isinstance(params, dict):
        return params
    temporal = ("time_stack", "time_mixer", "time_pos_embed")
    return {k: without_time(v) for k, v in params.items() if not k.startswith(temporal)}


def test_a_unet_of_any_kind_is_an_image_unet_with_its_options():
    image = as_image_unet(VideoUNet(**FIELDS))
    assert image.channel_mult == FIELDS["channel_mult"] and image.use_spatial_transformer
    assert as_image_unet(image) is image
    assert as_image_unet(nn.Dense(1)) is None


def test_remat_and_scan_reach_every_block():
    fields = ONE_LEVEL | {"transformer_depth": 2}
    plain, changed = VideoUNet(**fields), VideoUNet(**fields, remat=True, scan=True)
    shapes, stacked = video_shapes(plain), video_shapes(changed)
    assert jax.eval_shape(stack_blocks, shapes) == stacked
    names = {t.name: t.shape for t in file_tensors(stacked, "unet_ldm")}
    assert names == {t.name: t.shape for t in file_tensors(shapes, "unet_ldm")}
    program = jax.make_jaxpr(changed.apply)({"params": stacked}, *arguments())
    # 3 residual blocks, and 2 transformers with a spatial and a temporal block.
    assert str(program).count("checkpoint[") + str(program).count("remat2[") == 7


@pytest.mark.slow
def test_conditions_for_a_clip_are_those_of_every_frame(params):
    x, t, context, y = arguments()
    frames = x.shape[1]
    each = [jnp.repeat(a[:, None], frames, axis=1) for a in (context, y)]
    plain = run(params)
    np.testing.assert_allclose(run(params, [x, t, *each]), plain, rtol=1e-4, atol=1e-5)
    other = run(params, [x, t, each[0].at[0, 1].add(1.0), each[1]]) - plain
    assert jnp.abs(other[0, 1]).max() > 1e-3 and jnp.abs(other[1]).max() < 1e-5


def test_clips_do_not_see_one_another_and_frames_do(params):
    x, *rest = arguments()
    moved = [x.at[0, 2].add(1.0), *rest]
    changed = run(params, moved) - run(params)
    assert jnp.abs(changed[1]).max() < 1e-5
    assert all(jnp.abs(changed[0, frame]).max() > 1e-3 for frame in range(3))
    changed = run(params, moved, image_only=True) - run(params, image_only=True)
    assert jnp.abs(changed[0, :2]).max() == 0.0 and jnp.abs(changed[0, 2]).max() > 1e-3


def test_bfloat16_keeps_float32_parameters_and_output(params):
    shapes = video_shapes(VideoUNet(**ONE_LEVEL, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    exact, rounded = run(params), run(params, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 0 < jnp.abs(rounded - exact).max() < 0.05 * jnp.abs(exact).max()


def test_options_of_the_blocks_over_time():
    def tree(**fields):
        small = ONE_LEVEL | {"attention_resolutions": ()}
        return video_shapes(VideoUNet(**small | fields))["middle_block_1"]

    without = tree(disable_temporal_crossattention=True, merge_strategy="fixed")
    assert "attn1" in without["time_stack_0"] and "attn2" not in without["time_stack_0"]
    assert "time_mixer" not in without
    alone = tree(use_spatial_context=False)["time_stack_0"]["attn2"]
    assert alone["to_k"]["kernel"].shape == (32, 32)  # it attends to the frames once more
    deep = tree(transformer_depth_middle=3)
    assert {"time_stack_2", "time_mixer"} <= deep.keys() and "attn2" in deep["time_stack_0"]


def test_a_time_context_takes_the_place_of_the_first_context(params):
    def program(fields, given):
        module = VideoUNet(**ONE_LEVEL | fields)

        def run(params, x, t, context, y):
            extra = {"time_context": context} if given else {}
            return module.apply({"params": params}, x, t, context, y, **extra)

        return str(jax.make_jaxpr(run)(params, *arguments()))

    given = program({"use_spatial_context": False, "time_context_dim": 24}, True)
    assert given == program({}, False)


@pytest.mark.slow
def test_frames_split_over_devices_change_no_numbers():
    """One clip of four frames on two devices, each of which has two."""
    module = VideoUNet(**ONE_LEVEL | {"attention_resolutions": ()})
    params = {"params": video_fixtures.drawn_params(module)}
    x = jnp.asarray(unet_fixtures.numbers("frames", (1, 4, 8, 8, 8)))
    rest = [array[:1] for array in arguments()[1:]]
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    everywhere, by_frame = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "data"))
    )
    split = compiled(on_mesh(mesh, module.apply))
    placed = jax.device_put((params, x, *rest), (everywhere, by_frame, *[everywhere] * 3))
    ours = split(*placed)
    assert ours.sharding.is_equivalent_to(by_frame, 5)
    np.testing.assert_allclose(ours, compiled(module.apply)(params, x, *rest), rtol=1e-4, atol=1e-4)


X = jnp.ones((2, 3, 8, 8, 8))
INPUTS = {"x": X, "context": jnp.ones((2, 1, 24)), "y": jnp.ones((2, 24))}
BAD = {
    "x is 7 x 8 pixels; both should be multiples of 2": (FIELDS, {"x": X[:, :, :7]}),
    "context is for 2 frames, and x has 3": (ONE_LEVEL, {"context": jnp.ones((2, 2, 1, 24))}),
    "y is for 2 frames, and x has 3": (ONE_LEVEL, {"y": jnp.ones((2, 2, 24))}),
    "y has shape (2, 3); num_classes = 'sequential' needs (2, 24)": (
        ONE_LEVEL,
        {"y": jnp.ones((2, 3))},
    ),
    "image_only_indicator has shape (2, 2); it should have (2, 3)": (
        ONE_LEVEL,
        {"image_only_indicator": jnp.ones((2, 2))},
    ),
    "time_context is given and use_spatial_context = True": (
        ONE_LEVEL,
        {"time_context": jnp.ones((2, 1, 24))},
    ),
    "time_context is missing and time_context_dim = 5": (
        ONE_LEVEL | {"use_spatial_context": False, "time_context_dim": 5},
        {},
    ),
    "time_context has width 6; time_context_dim should be the same and is 5": (
        ONE_LEVEL | {"use_spatial_context": False, "time_context_dim": 5},
        {"time_context": jnp.ones((2, 1, 6))},
    ),
    "merge_strategy = 'mean' is unknown; choose from fixed": (
        ONE_LEVEL | {"merge_strategy": "mean"},
        {},
    ),
    "video_kernel_size = (3, 1) should be an odd number, or three": (
        ONE_LEVEL | {"video_kernel_size": (3, 1)},
        {},
    ),
    "num_heads = -1 should be at least 1": (
        ONE_LEVEL | {"num_head_channels": -1, "num_heads": -1},
        {},
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    fields, changed = BAD[message]
    module = VideoUNet(**fields)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(
            lambda key: module.init(key, t=jnp.ones(2), **INPUTS | changed), jax.random.key(0)
        )
    assert message in str(error.value)
