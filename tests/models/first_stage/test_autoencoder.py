"""The first stage against released parameter lists and counts, and its blocks against formulas."""

import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import autoencoder_fixtures as fixtures

from diffusion_jax.models.first_stage.autoencoder import LAST_LAYER, Autoencoder
from diffusion_jax.models.first_stage.blocks import AttnBlock, HalveSides, ResnetBlock

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
TINY = {
    "ch": 8,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 4,
    "resolution": 8,
    "z_channels": 3,
    "embed_dim": 2,
}
ONE_LEVEL = TINY | {"ch_mult": (1,)}
THREE, FIVE = {"ch_mult": (1, 2, 4)}, {"ch_mult": (1, 1, 2, 2, 4)}
Z3, VQ = {"z_channels": 3, "embed_dim": 3}, {"double_z": False}
# Fields, parameters of the encoder and of the decoder; Rombach et al. 2022 and generative-models.
RELEASED = {
    "kl-f8": ({}, 34_163_592, 49_490_179),
    "kl-f4": (THREE | Z3, 22_351_238, 32_960_771),
    "kl-f16": (
        FIVE | {"z_channels": 16, "embed_dim": 16, "attn_resolutions": (16,)},
        28_265_760,
        41_343_875,
    ),
    "kl-f32": (
        {
            "ch_mult": (1, 1, 2, 2, 4, 4),
            "z_channels": 64,
            "embed_dim": 64,
            "attn_resolutions": (16, 8),
        },
        42_614_656,
        61_244_803,
    ),
    "vq-f4": (THREE | Z3 | VQ, 22_337_411, 32_960_771),
    "vq-f4-noattn": (THREE | Z3 | VQ | {"attn_type": "none"}, 21_285_763, 31_909_123),
    "vq-f8": (VQ | {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,)}, 27_397_764, 40_253_955),
    "vq-f16": (
        FIVE | VQ | {"z_channels": 8, "embed_dim": 8, "attn_resolutions": (16,)},
        28_155_144,
        41_307_011,
    ),
    "imagenet-attnfree-logvar": (
        THREE | {"num_res_blocks": 4, "attn_type": "none", "use_quant_conv": False},
        33_705_864,
        44_310_787,
    ),
    "imagenet-kl_f8_8chn": (
        {
            "z_channels": 8,
            "embed_dim": 8,
            "attn_type": "vanilla-xformers",
            "use_quant_conv": False,
        },
        34_200_464,
        49_508_611,
    ),
    "sd2-x4-upscaler": (THREE, 22_360_456, 32_965_379),
}
LISTS = {
    "kl-f8": ("vae_klf8_encoder", "vae_klf8_decoder"),
    "imagenet-attnfree-logvar": (
        "ae_imagenet-attnfree-logvar_enc",
        "ae_imagenet-attnfree-logvar_dec",
    ),
    "imagenet-kl_f8_8chn": ("ae_imagenet-kl_f8_8chn_enc", "ae_imagenet-kl_f8_8chn_dec"),
}


def released_name(path, shape):
    """Give the released name and shape of a parameter: down_0_block_1 is down.0.block.1."""
    *modules, leaf = [entry.key for entry in path]
    name = ".".join([*modules, LEAVES[leaf]])
    name = re.sub(r"(down|up)_(\d+)_(block|attn)_(\d+)", r"\1.\2.\3.\4", name)
    name = re.sub(r"(down|up)_(\d+)_(downsample|upsample)", r"\1.\2.\3", name)
    name = name.replace("mid_", "mid.")
    return name, (shape[-1], shape[-2], *shape[:-2]) if leaf == "kernel" else shape


def abstract_params(module, side=32):
    image = jnp.ones((1, side, side, module.in_channels))
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def random_params(module, side=8):
    """Random numbers everywhere, of the size that keeps activations near one."""
    shapes = jax.tree.map(lambda a: a.shape, abstract_params(module, side))
    return jax.tree.map(jnp.asarray, fixtures.drawn_tree(shapes))


def compiled(function):
    """Compile with little optimisation: these networks run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", RELEASED)
def test_names_shapes_and_counts_are_the_released_ones(name):
    fields, encoder, decoder = RELEASED[name]
    module = Autoencoder(**fields)
    tree = abstract_params(module)
    assert (count(tree["encoder"]), count(tree["decoder"])) == (encoder, decoder)
    if name in LISTS:
        for half, listed in zip(("encoder", "decoder"), LISTS[name], strict=True):
            leaves = jax.tree_util.tree_leaves_with_path(tree[half])
            ours = dict(released_name(path, leaf.shape) for path, leaf in leaves)
            assert ours == fixtures.read_names()[listed]
    if module.use_quant_conv:
        z, d, parts = module.z_channels, module.embed_dim, 2 if module.double_z else 1
        assert tree["quant_conv"]["kernel"].shape == (1, 1, parts * z, parts * d)
        assert tree["post_quant_conv"]["kernel"].shape == (1, 1, d, z)
    else:
        assert set(tree) == {"encoder", "decoder"}
    leaf = tree
    for key in LAST_LAYER:
        leaf = leaf[key]
    assert leaf.shape == (3, 3, 128, 3)


@pytest.mark.parametrize("name", fixtures.RECORDED)
def test_outputs_are_those_of_diffusers(name):
    fields, *_ = fixtures.CASES[name]
    module = Autoencoder(**fields)
    params = {"params": random_params(module)}

    @compiled
    def run(params, image):
        moments = module.apply(params, image, method="encode")
        z = moments[..., : module.embed_dim]
        return {"moments": moments, "decoded": module.apply(params, z, method="decode")}

    ours = run(params, jnp.asarray(fixtures.inputs(fields)[0][:1]))
    with np.load(fixtures.FIXTURES / "autoencoder_diffusers.npz") as recorded:
        for key, array in ours.items():
            theirs = recorded[f"{name}/{key}"]
            assert np.abs(array - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.slow
def test_encode_and_decode():
    """Shapes, remat, tanh_out, the mean as latent, and half precision, on one set of numbers."""
    fields = TINY | {"attn_type": "none"}
    module = Autoencoder(**fields)
    params = {"params": random_params(module)}
    image = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))

    def both(module):
        def run(image):
            moments = module.apply(params, image, method="encode")
            return moments, module.apply(params, moments[..., :2], method="decode")

        return compiled(run)(image)

    moments, decoded = both(module)
    assert moments.shape == (2, 4, 6, 4) and decoded.shape == image.shape
    assert float(jnp.std(decoded)) > 0.1
    # By way of __call__, which decodes the mean.
    bounded = compiled(Autoencoder(**fields, remat=True, tanh_out=True).apply)(params, image)
    np.testing.assert_allclose(bounded, jnp.tanh(decoded), rtol=1e-5, atol=1e-5)
    low_moments, low = both(Autoencoder(**fields, dtype=jnp.bfloat16))
    assert low_moments.dtype == low.dtype == jnp.float32
    assert 0 < jnp.abs(low - decoded).max() < 0.1 * jnp.abs(decoded).max()


def test_give_pre_end_is_what_the_last_norm_sees():
    module = Autoencoder(**ONE_LEVEL, give_pre_end=True)
    shapes = abstract_params(module)
    assert "norm_out" not in shapes["decoder"] and "conv_out" not in shapes["decoder"]
    z = jnp.ones((1, 8, 8, 2))
    out = jax.eval_shape(lambda p: module.apply({"params": p}, z, method="decode"), shapes)
    assert out.shape == (1, 8, 8, 8)


def test_a_decoder_alone():
    module = Autoencoder(**TINY, decoder_only=True)
    shapes = abstract_params(module)
    assert set(shapes) == {"decoder", "post_quant_conv"}
    with pytest.raises(ValueError, match="decoder_only = True should be False"):
        module.apply({"params": shapes}, jnp.ones((1, 8, 8, 3)), method="encode")


def test_averaging_and_repeating_need_no_parameters():
    tree = abstract_params(Autoencoder(**TINY, resamp_with_conv=False))
    assert not [name for half in tree.values() for name in half if name.endswith("sample")]


def test_halving_pads_below_and_to_the_right():
    """A kernel that picks one of the nine pixels shows which pixel each is."""
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    padded = np.pad(np.arange(16.0).reshape(4, 4), ((0, 1), (0, 1)))
    for row, column in ((0, 0), (1, 1), (2, 2), (0, 2)):
        kernel = jnp.zeros((3, 3, 1, 1)).at[row, column].set(1.0)
        params = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}
        halved = HalveSides().apply(params, x)
        np.testing.assert_array_equal(
            halved[0, :, :, 0], padded[row : row + 3 : 2, column : column + 3 : 2]
        )


def group_norm(x, params, groups, eps=1e-6):
    b, h, w, c = x.shape
    grouped = x.reshape(b, h * w, groups, c // groups)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    normalised = ((grouped - mean) / np.sqrt(var + eps)).reshape(x.shape)
    return normalised * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_attention_and_residual_block_are_their_formulas():
    x = np.random.RandomState(0).standard_normal((2, 3, 4, 8)).astype(np.float32) * 0.01
    keys = jax.random.split(jax.random.key(1), 2)
    block = AttnBlock(num_groups=4)
    params = block.init(keys[0], jnp.asarray(x))["params"]

    def point(name, h):
        return h @ np.asarray(params[name]["kernel"])[0, 0] + np.asarray(params[name]["bias"])

    h = group_norm(x, params["norm"], 4).reshape(2, 12, 8)
    q, k, v = (point(name, h) for name in "qkv")
    scores = np.exp(np.einsum("blc,bmc->blm", q, k) / np.sqrt(8.0))
    h = np.einsum("blm,bmc->blc", scores / scores.sum(-1, keepdims=True), v)
    expected = x + point("proj_out", h).reshape(x.shape)
    ours = block.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)

    block = ResnetBlock(12, num_groups=4)
    params = block.init(keys[1], jnp.asarray(x))["params"]

    def conv(name, h):
        kernel, bias = (jnp.asarray(params[name][leaf]) for leaf in ("kernel", "bias"))
        dims = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return np.asarray(h) + np.asarray(bias)

    swish = lambda h: (h / (1.0 + np.exp(-h))).astype(np.float32)
    h = conv("conv1", swish(group_norm(x, params["norm1"], 4)))
    h = conv("conv2", swish(group_norm(h, params["norm2"], 4)))
    ours = block.apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(ours, conv("nin_shortcut", x) + h, rtol=1e-4, atol=1e-5)


def test_dropout_needs_train_and_its_key():
    module = Autoencoder(**ONE_LEVEL, attn_type="none", dropout=0.5)
    params = {"params": random_params(module)}
    image = jnp.ones((1, 4, 4, 3))

    @compiled
    def run(key):
        return module.apply(
            params, image, train=True, rngs={"dropout": key}, method="encode"
        ), module.apply(params, image, method="encode")

    (first, still), (second, _) = run(jax.random.key(0)), run(jax.random.key(1))
    assert not jnp.allclose(first, still) and not jnp.allclose(first, second)
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(lambda x: module.apply(params, x, train=True), image)


BAD = {
    "attn_type = 'linear' is unknown; choose one of vanilla": ({"attn_type": "linear"}, (8, 8, 3)),
    "attn_resolutions = (16,) names no level: resolution = 8": (
        {"attn_resolutions": (16,)},
        (8, 8, 3),
    ),
    "ch_mult is empty": ({"ch_mult": ()}, (8, 8, 3)),
    "num_res_blocks = 0 should be at least 1": ({"num_res_blocks": 0}, (8, 8, 3)),
    "embed_dim = 2 needs use_quant_conv = True": ({"use_quant_conv": False}, (8, 8, 3)),
    "the image is 7 x 8 pixels; both should be multiples of 2": ({}, (7, 8, 3)),
    "the image has 4 channels and in_channels = 3": ({}, (8, 8, 4)),
    "num_groups = 3 does not divide the 8 channels of encoder/down_0_block_0/norm1": (
        {"num_groups": 3},
        (8, 8, 3),
    ),
    "remat = 'some' is unknown": ({"remat": "some"}, (8, 8, 3)),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
    fields, shape = BAD[message]
    module = Autoencoder(**TINY | fields)
    with pytest.raises(ValueError) as error:
        jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *shape)))
    assert message in str(error.value)


def test_a_latent_of_other_channels_is_named():
    module = Autoencoder(**TINY | {"use_quant_conv": False, "embed_dim": 3})
    shapes = abstract_params(module)
    with pytest.raises(ValueError, match="z has 4 channels and z_channels = 3"):
        jax.eval_shape(
            lambda p: module.apply({"params": p}, jnp.ones((1, 4, 4, 4)), method="decode"), shapes
        )
