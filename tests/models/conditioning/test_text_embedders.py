"""What each embedder takes from its CLIP tower, CLIP's pixels, and the trainable text encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioning.clip import (
    ClipTextTower,
    ClipVisionTower,
    layer_norm,
    text_tower,
)
from diffusion_jax.models.conditioning.text_embedders import (
    CLIP_MEAN,
    CLIP_STD,
    ClipText,
    OpenClipImage,
    OpenClipText,
    TransformerText,
    clip_pixels,
)

TOWER = ClipTextTower(
    width=8, num_layers=3, num_heads=2, mlp_dim=12, vocab_size=20, max_length=7, projection_dim=5
)
TOKENS = jnp.array([[18, 3, 4, 5, 19, 0, 0], [18, 7, 3, 9, 9, 1, 19]])
VISION = ClipVisionTower(
    width=8, num_layers=1, num_heads=2, mlp_dim=12, projection_dim=5, image_size=6, patch_size=3
)


def randomised(tree, seed=7):
    """Replace every parameter, so that nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), "f4"), tree)


def compiled(function):
    """Compile with little optimisation: these functions run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def shapes_of(module, x):
    return jax.eval_shape(module.init, jax.random.key(0), x)["params"]


@pytest.fixture(scope="module")
def params():
    return randomised(shapes_of(TOWER, TOKENS))


@pytest.fixture(scope="module")
def states(params):
    return compiled(TOWER.apply)({"params": params}, TOKENS)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def final_norm(params, x):
    norm = layer_norm("norm", dtype=jnp.float32, param_dtype=jnp.float32)
    return norm.apply({"params": params["final_layer_norm"]}, x)


def test_clip_text_chooses_its_layer(params, states):
    def run(**fields):
        return ClipText(TOWER, **fields).apply({"params": params}, TOKENS)

    close(run(), states.normed)
    close(run(layer="pooled"), states.pooled[:, None, :])
    for index, k in ((0, 0), (2, 2), (3, 3), (-1, 3), (-2, 2), (-4, 0)):
        close(run(layer="hidden", layer_idx=index), states.hidden[k])
    hidden, pooled = run(layer="hidden", layer_idx=2, always_return_pooled=True)
    close(hidden, states.hidden[2])
    close(pooled, states.normed[jnp.arange(2), jnp.array([4, 6])])


def test_open_clip_text_of_sd2_norms_also_the_penultimate_layer(params, states):
    close(OpenClipText(TOWER).apply({"params": params}, TOKENS), states.normed)
    ours = OpenClipText(TOWER, layer="penultimate").apply({"params": params}, TOKENS)
    close(ours, final_norm(params, states.hidden[2]))


def test_open_clip_text_of_sdxl_norms_only_what_it_pools(params, states):
    def run(**fields):
        return OpenClipText(TOWER, legacy=False, **fields).apply({"params": params}, TOKENS)

    close(run(), states.hidden[3])
    close(run(layer="penultimate"), states.hidden[2])
    tokens, pooled = run(layer="penultimate", always_return_pooled=True)
    close(tokens, states.hidden[2])
    ends = final_norm(params, states.hidden[3])[jnp.arange(2), jnp.array([4, 6])]
    close(pooled, ends @ params["text_projection"]["kernel"])


@pytest.mark.parametrize(
    ("module", "released"),
    [
        (ClipText(text_tower("ViT-L-14"), layer="hidden", layer_idx=11), 123_060_480),
        (OpenClipText(text_tower("ViT-H-14"), layer="penultimate"), 354_032_640),
        (OpenClipText(text_tower("ViT-bigG-14"), "penultimate", False, True), 694_659_840),
    ],
    ids=["SDXL's first, SD 1", "SD 2", "SDXL's second"],
)
def test_no_released_parameter_is_left_out(module, released):
    """Also those of layers that are not computed; and they are where the tower has them."""
    tokens = jnp.zeros((1, 77), jnp.int32)
    shapes = shapes_of(module, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == released
    assert shapes == shapes_of(module.tower, tokens)


@pytest.mark.slow
def test_the_image_embedder_of_svd():
    image = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 9, 12, 3)), jnp.float32)
    params = randomised(shapes_of(VISION, jnp.zeros((2, 6, 6, 3))))
    states = VISION.apply({"params": params}, clip_pixels(image, 6))

    def run(image, **fields):
        return OpenClipImage(VISION, **fields).apply({"params": params}, image)

    assert shapes_of(OpenClipImage(VISION), image) == jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
    )
    close(run(image), states.projected)
    close(run(image, unsqueeze_dim=True), states.projected[:, None, :])
    tokens, z = run(image, output_tokens=True)
    close(tokens, states.patches)
    close(z, states.projected)
    frames = run(jnp.stack([image, image[:, ::-1]], axis=1))
    assert frames.shape == (len(image), 2, states.projected.shape[-1])
    close(frames[:, 0], states.projected)
    assert not np.allclose(run(image, antialias=False), states.projected, atol=1e-3)


def unnormalised(pixels):
    return 2 * (np.asarray(pixels) * CLIP_STD + CLIP_MEAN) - 1


def test_pixels_of_the_right_size_are_only_normalised():
    image = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 8, 8, 3)), jnp.float32)
    np.testing.assert_allclose(unnormalised(clip_pixels(image, 8)), image, atol=1e-6)
    white = np.asarray(clip_pixels(jnp.ones((1, 300, 250, 3))))
    assert white.shape == (1, 224, 224, 3)
    expected = (1 - np.array(CLIP_MEAN)) / CLIP_STD
    np.testing.assert_allclose(white, np.broadcast_to(expected, white.shape), rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        ((9, 6, 5), {0: [-0.897194, -0.479844, -0.427531, -0.238855, 0.621677],
                     3: [0.759436, 0.568218, -0.035404, -0.502662, -0.250697]}),
        ((4, 7, 6), {1: [-0.201454, -0.387392, -0.128139, 0.13326, 0.545937, -0.28],
                     5: [0.454545, -0.265455, -0.120727, -0.120727, -0.265455, 0.454545]}),
        ((12, 5, 4), {2: [0.075996, 0.321886, -0.466974, -0.255236],
                      3: [-0.259512, -0.070008, 0.186897, -0.470142]}),
    ],
)  # fmt: skip
def test_pixels_are_resized_as_kornia_does(size, rows):
    """Recorded from kornia 0.9.0: resize(..., "bicubic", align_corners=True, antialias=True)."""
    height, width, small = size
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    pattern = (7 * y * y + 3 * x * x + 5 * x * y) % 11 / 5.5 - 1
    image = jnp.asarray(np.repeat(pattern[None, :, :, None], 3, -1), jnp.float32)
    resized = unnormalised(clip_pixels(image, small))
    for row, values in rows.items():
        for channel in range(3):
            np.testing.assert_allclose(resized[0, row, :, channel], values, atol=2e-6)


TRAINABLE = {
    "vocab_size": 20, "max_length": 7, "width": 8, "num_layers": 2, "num_heads": 2, "head_dim": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def trainable():
    module = TransformerText(**TRAINABLE)
    params = randomised(shapes_of(module, TOKENS))
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(2, 7, 8)), jnp.float32)

    def loss(params):
        output = module.apply({"params": params}, TOKENS)
        return jnp.sum(weights * output), output

    gradient, output = compiled(jax.grad(loss, has_aux=True))(params)
    return module, params, output, gradient


def test_every_parameter_of_the_text_transformer_learns(trainable):
    module, params, output, gradient = trainable
    assert output.shape == (2, 7, 8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 1e-4, jax.tree_util.keystr(path)
    used = np.abs(gradient["embeddings"]["token_embedding"]["embedding"]).max(-1) > 0
    assert set(np.flatnonzero(used)) == set(np.asarray(TOKENS).ravel())


def test_the_text_transformer_sees_the_whole_text_in_order(trainable):
    module, params, output, _ = trainable
    run = compiled(lambda tokens: module.apply({"params": params}, tokens))
    changed = run(TOKENS.at[:, -1].set(5))
    assert not np.allclose(changed[:, 0], output[:, 0], atol=1e-3)
    turned = run(TOKENS[:, ::-1])[:, ::-1]
    assert not np.allclose(turned, output, atol=1e-3)
    bare = params | {"embeddings": jax.tree.map(jnp.copy, params["embeddings"])}
    table = bare["embeddings"]["position_embedding"]["embedding"]
    bare["embeddings"]["position_embedding"]["embedding"] = jnp.zeros_like(table)
    forwards, backwards = (module.apply({"params": bare}, t) for t in (TOKENS, TOKENS[:, ::-1]))
    np.testing.assert_allclose(forwards, backwards[:, ::-1], rtol=1e-4, atol=1e-5)


def test_parameters_of_latent_diffusions_text_transformer():
    """Per block: to_q, to_k, to_v and to_out of 8 heads of 64, the MLP, two norms."""
    shapes = shapes_of(TransformerText(vocab_size=30522), jnp.zeros((1, 77), jnp.int32))
    block = 4 * 1280 * 512 + 1280 + 8 * 1280**2 + 5 * 1280 + 4 * 1280
    by_hand = (30522 + 77) * 1280 + 32 * block + 2 * 1280
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == by_hand == 542_895_360


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (ClipText(TOWER, layer="penultimate"), "layer = 'penultimate' is unknown; choose one of l"),
        (ClipText(TOWER, layer="hidden"), "needs a layer_idx from -4 to 3, not None"),
        (ClipText(TOWER, layer="hidden", layer_idx=4), "needs a layer_idx from -4 to 3, not 4"),
        (OpenClipText(TOWER, layer="pooled"), "layer = 'pooled' is unknown; choose one of last"),
        (OpenClipText(TOWER, always_return_pooled=True), "needs legacy = False and a projection"),
        (
            OpenClipText(TOWER.clone(projection_dim=None), legacy=False, always_return_pooled=True),
            "projection_dim = None",
        ),
        (TransformerText(**TRAINABLE | {"max_length": 6}), "got 7 tokens; it has 6 positions"),
    ],
)
def test_mistakes_are_named(module, sentence):
    with pytest.raises(ValueError, match=sentence):
        shapes_of(module, TOKENS)
