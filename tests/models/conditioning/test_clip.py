"""The CLIP towers: against the formulas in NumPy, and against the released parameter counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioning.clip import (
    ACTIVATIONS,
    ADDED,
    TEXT_SIZES,
    VISION_SIZES,
    ClipTextTower,
    ClipVisionTower,
    TextEmbeddings,
    text_tower,
    vision_tower,
)

TEXT = {
    "width": 8,
    "num_layers": 3,
    "num_heads": 2,
    "mlp_dim": 12,
    "projection_dim": 5,
    "vocab_size": 20,
    "max_length": 7,
}
VISION = {
    "width": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 12,
    "projection_dim": 5,
    "image_size": 6,
    "patch_size": 2,
    "activation": "gelu",
}
# 19 is the end of a text and, as with OpenAI's CLIP, what it is padded with.
TOKENS = jnp.array([[18, 3, 4, 5, 19, 19, 19], [18, 7, 3, 9, 9, 1, 19]])
IMAGE = jax.random.normal(jax.random.key(3), (2, 6, 6, 3))
TREE = """
embeddings/token_embedding/embedding embeddings/position_embedding/embedding
encoder/layers_0/layer_norm1/scale encoder/layers_0/layer_norm1/bias
encoder/layers_0/layer_norm2/scale encoder/layers_0/layer_norm2/bias
encoder/layers_0/mlp/fc1/kernel encoder/layers_0/mlp/fc1/bias
encoder/layers_0/mlp/fc2/kernel encoder/layers_0/mlp/fc2/bias
encoder/layers_0/self_attn/q_proj/kernel encoder/layers_0/self_attn/q_proj/bias
encoder/layers_0/self_attn/k_proj/kernel encoder/layers_0/self_attn/k_proj/bias
encoder/layers_0/self_attn/v_proj/kernel encoder/layers_0/self_attn/v_proj/bias
encoder/layers_0/self_attn/out_proj/kernel encoder/layers_0/self_attn/out_proj/bias
final_layer_norm/scale final_layer_norm/bias text_projection/kernel
""".split()


def randomised(tree, seed=7):
    """Replace every parameter, so that nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), "f4"), tree)


def compiled(function):
    """Compile with little optimisation: these functions run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def shapes_of(module, x, **kwargs):
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, **kwargs), x)["params"]


def count(module, x):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(module, x)))


@pytest.fixture(scope="module")
def params():
    return randomised(shapes_of(ClipTextTower(**TEXT), TOKENS))


@pytest.fixture(scope="module")
def states(params):
    return compiled(ClipTextTower(**TEXT).apply)({"params": params}, TOKENS)


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gelu(x):
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def quick_gelu(x):
    return x / (1.0 + np.exp(-1.702 * x))


def encode(x, layers, num_heads, activation, causal):
    """Hidden states of one sequence x [l d], float64, head by head."""
    hidden = [x]
    size = x.shape[1] // num_heads
    for i in range(len(layers)):
        p = layers[f"layers_{i}"]
        h = norm(x, p["layer_norm1"])
        q, k, v = (dense(h, p["self_attn"][f"{name}_proj"]) for name in "qkv")
        heads = []
        for n in range(num_heads):
            of_head = slice(n * size, (n + 1) * size)
            scores = q[:, of_head] @ k[:, of_head].T / math.sqrt(size)
            if causal:
                scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, of_head])
        x = x + dense(np.concatenate(heads, -1), p["self_attn"]["out_proj"])
        h = activation(dense(norm(x, p["layer_norm2"]), p["mlp"]["fc1"]))
        x = x + dense(h, p["mlp"]["fc2"])
        hidden.append(x)
    return hidden


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize(
    ("name", "activation"), [("quick_gelu", quick_gelu), ("gelu", gelu)], ids=["openai", "openclip"]
)
def test_text_tower_is_the_formula(params, name, activation):
    tower = ClipTextTower(**TEXT, activation=name)
    ours = compiled(tower.apply)({"params": params}, TOKENS)
    p = in_float64(params)
    for row, end in ((0, 4), (1, 6)):
        tokens = np.asarray(TOKENS[row])
        x = p["embeddings"]["token_embedding"]["embedding"][tokens]
        x = x + p["embeddings"]["position_embedding"]["embedding"]
        hidden = encode(x, p["encoder"], 2, activation, causal=True)
        for k in range(4):
            np.testing.assert_allclose(ours.hidden[k][row], hidden[k], rtol=1e-4, atol=1e-4)
        normed = norm(hidden[-1], p["final_layer_norm"])
        np.testing.assert_allclose(ours.normed[row], normed, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.pooled[row], normed[end], rtol=1e-4, atol=1e-4)
        projected = normed[end] @ p["text_projection"]["kernel"]
        np.testing.assert_allclose(ours.projected[row], projected, rtol=1e-4, atol=1e-4)


def test_vision_tower_is_the_formula():
    tower = ClipVisionTower(**VISION)
    params = randomised(shapes_of(tower, IMAGE))
    ours = compiled(tower.apply)({"params": params}, IMAGE)
    p = in_float64(params)
    kernel = p["embeddings"]["patch_embedding"]["kernel"].reshape(12, 8)
    for row in range(2):
        image = np.asarray(IMAGE[row], np.float64)
        corners = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)]
        patches = [image[y : y + 2, x : x + 2].reshape(12) @ kernel for y, x in corners]
        x = np.stack([p["embeddings"]["class_embedding"], *patches])
        x = x + p["embeddings"]["position_embedding"]["embedding"]
        x = norm(x, p["pre_layrnorm"])
        x = encode(x, p["encoder"], 2, gelu, causal=False)[-1]
        np.testing.assert_allclose(ours.patches[row], x[1:], rtol=1e-4, atol=1e-4)
        projected = norm(x[0], p["post_layernorm"]) @ p["visual_projection"]["kernel"]
        np.testing.assert_allclose(ours.projected[row], projected, rtol=1e-4, atol=1e-4)


def test_leaving_layers_out_changes_neither_states_nor_parameters(params, states):
    tower = ClipTextTower(**TEXT)
    early = compiled(lambda p, t: tower.apply(p, t, 1))({"params": params}, TOKENS)
    assert len(early.hidden) == 2 and early.pooled is None and early.projected is None
    np.testing.assert_allclose(early.hidden[1], states.hidden[1], rtol=1e-6)
    p = in_float64(params["final_layer_norm"])
    np.testing.assert_allclose(
        early.normed, norm(np.asarray(early.hidden[1]), p), rtol=1e-4, atol=1e-5
    )
    assert shapes_of(tower, TOKENS, layers=1) == shapes_of(tower, TOKENS)


def test_a_shorter_row_of_tokens_gives_the_same_states(params, states):
    short = compiled(ClipTextTower(**TEXT).apply)({"params": params}, TOKENS[:, :5])
    np.testing.assert_allclose(short.normed, states.normed[:, :5], rtol=1e-4, atol=1e-5)


def test_remat_changes_no_gradient(params):
    def gradient(remat):
        def loss(p):
            return jnp.sum(
                ClipTextTower(**TEXT, remat=remat).apply({"params": p}, TOKENS).projected
            )

        return compiled(jax.grad(loss))(params)

    for left, right in zip(*(jax.tree.leaves(gradient(r)) for r in (True, False)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5 * np.abs(right).max())


def test_half_precision(params, states):
    half = ClipTextTower(**TEXT, dtype=jnp.bfloat16)
    ours = compiled(half.apply)({"params": params}, TOKENS)
    assert ours.normed.dtype == ours.projected.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.normed, states.normed, atol=0.05 * np.abs(states.normed).max())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(half, TOKENS))} == {jnp.dtype("f4")}


def test_names_are_hugging_faces():
    def paths(module, x):
        leaves = jax.tree_util.tree_leaves_with_path(shapes_of(module, x))
        return {"/".join(key.key for key in path) for path, _ in leaves}

    assert paths(ClipTextTower(**TEXT | {"num_layers": 1}), TOKENS) == set(TREE)
    expected = {name for name in TREE if name.startswith("encoder")}
    expected |= {
        f"{name}/{leaf}"
        for name in ("pre_layrnorm", "post_layernorm")
        for leaf in ("scale", "bias")
    }
    expected |= {
        "visual_projection/kernel",
        "embeddings/class_embedding",
        "embeddings/patch_embedding/kernel",
        "embeddings/position_embedding/embedding",
    }
    assert paths(ClipVisionTower(**VISION | {"num_layers": 1}), IMAGE) == expected


def transformer_size(width, layers, mlp):
    """Four projections, two of the MLP, two norms, all with biases."""
    return layers * (4 * (width + 1) * width + 2 * width * mlp + mlp + width + 4 * width)


@pytest.mark.parametrize(
    ("name", "released"),
    [("ViT-L-14", 123_060_480), ("ViT-H-14", 354_032_640), ("ViT-bigG-14", 694_659_840)],
)
def test_parameters_of_the_released_text_towers(name, released):
    width, layers = {"ViT-L-14": (768, 12), "ViT-H-14": (1024, 24), "ViT-bigG-14": (1280, 32)}[name]
    projection = 0 if name == "ViT-L-14" else width * width
    by_hand = (49408 + 77) * width + transformer_size(width, layers, 4 * width) + 2 * width
    assert by_hand + projection == released
    assert count(text_tower(name), jnp.zeros((1, 77), jnp.int32)) == released


@pytest.mark.parametrize(
    ("name", "released"), [("ViT-L-14", 303_966_208), ("ViT-H-14", 632_076_800)]
)
def test_parameters_of_the_released_vision_towers(name, released):
    width, layers, out = {"ViT-L-14": (1024, 24, 768), "ViT-H-14": (1280, 32, 1024)}[name]
    embeddings = (1 + 14 * 14 * 3 + 257) * width
    by_hand = embeddings + transformer_size(width, layers, 4 * width) + (4 + out) * width
    assert by_hand == released
    assert count(vision_tower(name), jnp.zeros((1, 224, 224, 3))) == released


def test_sizes_can_be_overruled():
    assert text_tower("ViT-H-14", num_layers=2).num_layers == 2
    assert set(TEXT_SIZES) > set(VISION_SIZES) and set(ACTIVATIONS) == {"gelu", "quick_gelu"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: text_tower("ViT-B"), "text tower 'ViT-B' is unknown; choose ViT-L-14, ViT-H-14"),
        (lambda: vision_tower("ViT-bigG-14"), "vision tower 'ViT-bigG-14' is unknown"),
        (
            lambda: shapes_of(ClipTextTower(**TEXT), TOKENS, layers=4),
            "layers = 4 of a text tower that has 3; choose 0 to 3",
        ),
        (
            lambda: shapes_of(ClipTextTower(**TEXT), jnp.zeros((1, 8), jnp.int32)),
            "embeddings got 8 tokens; it has 7 positions",
        ),
        (
            lambda: shapes_of(ClipTextTower(**TEXT | {"num_heads": 3}), TOKENS),
            "num_heads = 3 does not divide the width 8 of encoder/layers_0/self_attn",
        ),
        (
            lambda: shapes_of(ClipTextTower(**TEXT, activation="relu"), TOKENS),
            "activation = 'relu' of encoder/layers_0/mlp is unknown; choose one of quick_gelu",
        ),
        (
            lambda: shapes_of(ClipVisionTower(**VISION), IMAGE[:, :5]),
            r"images of shape \(5, 6, 3\); it reads \(6, 6, 3\)",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_new_tokens_read_their_vectors_and_are_no_end_of_a_text():
    module = TextEmbeddings(width=8, vocab_size=20, max_length=7)
    plain = randomised(module.init(jax.random.key(0), TOKENS)["params"])
    new = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), "f4")
    tokens = TOKENS.at[0, 2].set(21)

    def embedded(new):
        return module.apply({"params": {**plain, ADDED: new}}, tokens)

    table, places = (plain[f"{n}_embedding"]["embedding"] for n in ("token", "position"))
    expected = np.concatenate([table, new])[tokens] + places[None]
    np.testing.assert_allclose(embedded(new), expected, rtol=1e-6)
    gradient = jax.grad(lambda new: embedded(new).sum())(new)
    np.testing.assert_array_equal(gradient, [[0.0] * 8, [1.0] * 8])
    np.testing.assert_array_equal(
        module.apply({"params": {**plain, ADDED: new}}, TOKENS),
        module.apply({"params": plain}, TOKENS),
    )
    tower = ClipTextTower(**TEXT)
    params = randomised(jax.eval_shape(tower.init, jax.random.key(0), TOKENS)["params"])
    params = {**params, "embeddings": {**params["embeddings"], ADDED: new}}
    states = tower.apply({"params": params}, tokens)
    np.testing.assert_array_equal(states.pooled[0], states.normed[0, 4])
