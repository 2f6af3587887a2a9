"""CLIP against PyTorch: transformers' towers and tokenizer, torch's interpolation.

Every weight is random and none is zero. Outputs and the gradients of all weights are compared.
"""

import html

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data.tokenizer import _read_merges, clip_tokenizer, find_vocabulary
from diffusion_jax.models.conditioning.clip import ClipTextTower, ClipVisionTower
from diffusion_jax.models.conditioning.spatial_rescaler import SpatialRescaler
from diffusion_jax.models.conditioning.text_embedders import CLIP_MEAN, CLIP_STD, clip_pixels

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIZES = {"width": 32, "num_layers": 3, "num_heads": 4, "mlp_dim": 48, "projection_dim": 24}
ACTIVATIONS = ["quick_gelu", "gelu"]
RNG = np.random.default_rng(0)


def config_of(kind, activation, **fields):
    return kind(
        hidden_size=SIZES["width"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        intermediate_size=SIZES["mlp_dim"],
        projection_dim=SIZES["projection_dim"],
        hidden_act=activation,
        **fields,
    )


def random_weights(model):
    """Fill a torch model and return its parameters by name."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return dict(model.named_parameters())


def to_ours(array):
    """Turn a torch layout (out, in, ...) into ours; embeddings are told apart by their name."""
    return np.moveaxis(np.moveaxis(array, 0, -1), 0, -2) if array.ndim > 1 else array


def our_tree(arrays):
    """Arrays by torch's names -> our tree."""
    tree = {}
    for name, array in arrays.items():
        *path, leaf = name.removeprefix("text_model.").removeprefix("vision_model.").split(".")
        path = ".".join(path).replace("layers.", "layers_").split(".") if path else []
        if leaf == "weight":
            table = path[-1] in ("token_embedding", "position_embedding")
            leaf = "embedding" if table else "scale" if "norm" in path[-1] else "kernel"
            array = array if table else to_ours(array)
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(array)
    return tree


def relative_error(ours, theirs, floor=0.0):
    theirs = np.asarray(theirs.detach() if isinstance(theirs, torch.Tensor) else theirs)
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), floor)


def assert_gradients_agree(ours, weights):
    """Compare relative to each gradient's largest entry, or to 1 % of the largest of all.

    The gradient of the keys' bias is zero but for rounding.
    """
    theirs = our_tree({name: weight.grad.numpy() for name, weight in weights.items()})
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    floor = 0.01 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    errors = jax.tree.map(lambda o, t: float(relative_error(o, t, floor)), ours, theirs)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("projected", [False, True])
def test_text_towers(activation, projected):
    config = config_of(
        transformers.CLIPTextConfig, activation, vocab_size=50, max_position_embeddings=11,
        eos_token_id=2,
    )  # fmt: skip
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    model = getattr(transformers, kind)(config).eval()
    weights = random_weights(model)
    tokens = RNG.integers(0, 48, (3, 11))
    for row, end in enumerate((4, 7, 10)):
        tokens[row, end:] = 49
    out = model(torch.tensor(tokens), output_hidden_states=True)
    result = out.text_embeds if projected else out.pooler_output
    outputs = result, out.last_hidden_state, out.hidden_states[2]
    cotangents = [torch.tensor(RNG.normal(size=x.shape), dtype=torch.float32) for x in outputs]
    sum((a * b).sum() for a, b in zip(outputs, cotangents, strict=True)).backward()

    fields = SIZES | {"projection_dim": SIZES["projection_dim"] if projected else None}
    tower = ClipTextTower(**fields, activation=activation, vocab_size=50, max_length=11)

    def loss(params):
        states = tower.apply({"params": params}, jnp.asarray(tokens))
        chosen = states.projected if projected else states.pooled
        parts = zip((chosen, states.normed, states.hidden[2]), cotangents, strict=True)
        return sum(jnp.sum(a * jnp.asarray(b)) for a, b in parts), states

    params = our_tree({name: weight.detach().numpy() for name, weight in weights.items()})
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.asarray(tokens))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    gradient, states = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative_error(states.projected if projected else states.pooled, result) < 1e-4
    assert relative_error(states.normed, out.last_hidden_state) < 1e-4
    assert len(out.hidden_states) == len(states.hidden) == 4
    for ours, theirs in zip(states.hidden, out.hidden_states, strict=True):
        assert relative_error(ours, theirs) < 1e-4
    assert_gradients_agree(gradient, weights)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_vision_tower(activation):
    config = config_of(transformers.CLIPVisionConfig, activation, image_size=12, patch_size=4)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    weights = random_weights(model)
    image = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)
    out = model(torch.tensor(np.moveaxis(image, -1, 1)))
    outputs = out.image_embeds, out.last_hidden_state[:, 1:]
    cotangents = [torch.tensor(RNG.normal(size=x.shape), dtype=torch.float32) for x in outputs]
    sum((a * b).sum() for a, b in zip(outputs, cotangents, strict=True)).backward()
    tower = ClipVisionTower(**SIZES, activation=activation, image_size=12, patch_size=4)

    def loss(params):
        states = tower.apply({"params": params}, jnp.asarray(image))
        parts = zip((states.projected, states.patches), cotangents, strict=True)
        return sum(jnp.sum(a * jnp.asarray(b)) for a, b in parts), states

    params = our_tree({name: weight.detach().numpy() for name, weight in weights.items()})
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.asarray(image))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    gradient, states = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert relative_error(states.projected, out.image_embeds) < 1e-4
    assert relative_error(states.patches, out.last_hidden_state[:, 1:]) < 1e-4
    assert_gradients_agree(gradient, weights)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("multiplier", [0.5, 0.4, 0.75, 1.5, 2.0])
def test_rescaling(method, multiplier):
    image = RNG.normal(size=(2, 13, 10, 3)).astype(np.float32)
    module = SpatialRescaler(n_stages=2, method=method, multiplier=multiplier)
    theirs = torch.tensor(np.moveaxis(image, -1, 1))
    for _ in range(2):
        theirs = torch.nn.functional.interpolate(theirs, scale_factor=multiplier, mode=method)
    ours = module.apply({}, jnp.asarray(image))
    np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, -1), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(500, 300), (224, 448), (100, 150), (225, 224)])
def test_clip_pixels(height, width):
    """kornia's resize, written with torch: a Gaussian blur, then bicubic with align_corners."""
    image = RNG.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
    x = torch.tensor(np.moveaxis(image, -1, 1))
    factors = height / 224, width / 224
    if max(factors) > 1:
        for axis, factor in enumerate(factors):
            sigma = max((factor - 1) / 2, 0.001)
            size = int(max(4 * sigma, 3))
            size += 1 - size % 2
            offsets = torch.arange(size, dtype=torch.float64) - size // 2
            kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
            kernel = (kernel / kernel.sum()).float().reshape(1, 1, *((-1, 1), (1, -1))[axis])
            pad = [0, 0, size // 2, size // 2] if axis == 0 else [size // 2, size // 2, 0, 0]
            padded = torch.nn.functional.pad(x, pad, mode="reflect")
            x = torch.nn.functional.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bicubic", align_corners=True)
    theirs = (np.moveaxis((x.numpy() + 1) / 2, 1, -1) - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(clip_pixels(jnp.asarray(image)), theirs, atol=2e-4)


SUBJECTS = ["a cat", "Two DOGS", "café au lait", "naïve Ångström", "猫と犬", "Привет, мир", "🦊🔥",
            "the man's hat", "user_name-42", "3.14159 & co", "“curly” ‘quotes’",
            "ΟΔΥΣΣΕΥΣ"]  # fmt: skip
PATTERNS = ["{}", "a photo of {}", "{}, 8k, trending on artstation!!", "  {}\n\t{}  ", "{}'s {}'ll",
            "(({}:1.3)), [{}]", "{}{}", "#{}@{}...", "<b>{}</b> --ar 16:9", "emoji: {} 👩‍🚀 ❤️",
            "<|startoftext|>{}<|endoftext|>", "e\u0301 {} \u00a0 \u3000", "ＦＵＬＬ ﬁ {} İ ẞ ſ",
            "{} 100% $5,000.00 ½ Ⅷ 2026-11-24", "{} \u200b \ufeff \x07 \u2028",
            "I'D've {} O'Reilly 'T 'Re", "very " * 90 + "{}", "{}" * 40]  # fmt: skip


def test_tokenizer():
    texts = [pattern.replace("{}", subject) for pattern in PATTERNS for subject in SUBJECTS]
    texts += ["", " ", "x" * 10_000, "word " * 2000, "!?" * 300]
    assert len(texts) > 200
    ours = clip_tokenizer()
    vocabulary = ours.tokenizer.get_vocab()
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=_read_merges(find_vocabulary()))
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    for text, row, ids in zip(texts, ours(texts), expected, strict=True):
        assert row.tolist() == ids, text
    lengths = [len(ids) for ids in theirs(texts)["input_ids"]]
    assert ours.num_tokens(texts).tolist() == lengths
    zero_padded = theirs(texts, padding="max_length", max_length=77, truncation=True)
    mask = np.array(zero_padded["attention_mask"])
    padded = np.where(mask, expected, 0)
    assert clip_tokenizer(pad="zero")(texts).tolist() == padded.tolist()
    escaped = [html.escape(text) for text in texts]
    assert ours(escaped).tolist() == ours(texts).tolist()
