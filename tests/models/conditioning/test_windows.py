"""Texts in windows and weights of tokens, against encoding each window alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.experiment.network.text import with_null_tokens
from diffusion_jax.models.conditioning.conditioner import embed, init_embedders
from diffusion_jax.models.conditioning.embedders import clip_text, open_clip_text
from diffusion_jax.models.conditioning.windows import (
    encode_windows,
    first_window,
    null_tokens,
    token_shape,
    weigh,
)

SIZES = {"width": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}
RNG = np.random.default_rng(0)
START, END = 49406, 49407


def texts(windows, count=2):
    words = RNG.integers(0, 400, (count, windows, 77)).astype(np.int32)
    words[..., 0], words[..., -1] = START, END
    return words


def towers(**options):
    """Two towers as SDXL has them, joined on the features, and the pooled state of the second."""
    return {
        "l": clip_text(layer="hidden", layer_idx=1, **SIZES, **options),
        "g": open_clip_text(
            tower="ViT-bigG-14",
            layer="penultimate",
            legacy=False,
            always_return_pooled=True,
            projection_dim=6,
            **SIZES,
            **options,
        ),
    }


def encoded(embedders, params, tokens, **options):
    batch = {embedder.input_key: jnp.asarray(tokens) for embedder in embedders.values()}
    found = embed(embedders, params, batch, **options)
    return found["crossattn"], found["vector"]


@pytest.fixture(scope="module")
def params():
    embedders = towers()
    batch = {embedder.input_key: jnp.asarray(texts(1)[:, 0]) for embedder in embedders.values()}
    params = init_embedders(embedders, batch, jax.random.key(0), trainable=False)
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(0, 0.5, leaf.shape), "f4"), params)


def with_weights(tokens, weights):
    return np.stack([tokens.astype(np.float32), np.broadcast_to(weights, tokens.shape)], -1)


def test_each_window_is_as_if_it_were_alone_and_the_first_one_is_pooled(params):
    tokens = texts(3)
    states, pooled = encoded(towers(), params, tokens)
    assert states.shape == (2, 3 * 77, 16)
    for window in range(3):
        own, own_pooled = encoded(towers(), params, tokens[:, window])
        np.testing.assert_allclose(states[:, 77 * window :][:, :77], own, rtol=1e-5, atol=1e-6)
        if window == 0:
            np.testing.assert_allclose(pooled, own_pooled, rtol=1e-5, atol=1e-6)


def test_one_window_and_weights_of_1_are_bit_equal_to_plain_text(params):
    tokens = texts(1)
    for plain, others in zip(
        encoded(towers(), params, tokens[:, 0]),
        zip(
            encoded(towers(), params, tokens),
            encoded(towers(), params, with_weights(tokens, np.float32(1))),
            strict=True,
        ),
        strict=True,
    ):
        for other in others:
            np.testing.assert_array_equal(plain, other)


def test_weights_multiply_the_states_of_their_tokens_and_the_mean_of_a_window_stays(params):
    tokens, weights = texts(2), np.ones((2, 2, 77), np.float32)
    weights[0, 1, 5:8] = 1.5
    weights[1, 0, 2] = 0.3
    embedders = {"l": towers()["l"]}
    batch = lambda value: {embedders["l"].input_key: jnp.asarray(value)}  # noqa: E731
    plain = np.asarray(embed(embedders, params, batch(tokens))["crossattn"])
    found = embed(embedders, params, batch(with_weights(tokens, weights)))["crossattn"]
    plain, found = (np.asarray(x).reshape(2, 2, 77, 8) for x in (plain, found))
    expected = plain * weights[..., None]
    expected *= (plain.mean((2, 3)) / expected.mean((2, 3)))[..., None, None]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(found[0, 0], plain[0, 0])  # a window without weights
    np.testing.assert_allclose(found.mean((2, 3)), plain.mean((2, 3)), rtol=1e-3, atol=1e-5)
    assert np.abs(found[0, 1] - plain[0, 1]).max() > 0.1


def test_states_whose_weighted_mean_is_0_stay_finite():
    states = jnp.asarray([[[[1.0, 1.0], [1.0, 1.0]]]])
    np.testing.assert_array_equal(
        weigh(states, jnp.asarray([[[1.0, -1.0]]])), [[[[1, 1], [-1, -1]]]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_the_unconditional_half_reads_the_empty_text_in_every_window(params, weighted):
    embedders = {
        name: with_null_tokens(embedder, name)
        for name, embedder in towers(ucg_rate=0.1, legacy_ucg_value="").items()
    }
    tokens, null = texts(2), embedders["l"].null_value
    assert null.shape == (77,)
    value = with_weights(tokens, np.float32(1.3)) if weighted else tokens
    found, _ = encoded(embedders, params, value, unconditional=True)
    for window in range(2):
        for name, part in (("l", slice(0, 8)), ("g", slice(8, 16))):
            own = {name: embedders[name]}
            batch = {own[name].input_key: jnp.asarray(embedders[name].null_value)[None]}
            alone = embed(own, params, batch)["crossattn"][0]
            given = found[0, 77 * window :][:77, part]
            np.testing.assert_allclose(given, alone, rtol=1e-5, atol=1e-6)


def test_windows_of_training_are_shapes_of_the_config():
    embedders = towers(windows=3, weighted=True)
    assert embedders["l"].input_key == "caption_tokens_eos77x3_weighted"
    assert embedders["l"].example(2, (8, 8, 4)).shape == (2, 3, 77, 2)
    assert embedders["l"].example(2, (8, 8, 4)).dtype == jnp.float32
    shapes = conditioning_shapes(embedders, (8, 8, 4))
    assert shapes["crossattn"].shape == (1, 231, 16) and shapes["vector"].shape == (1, 6)
    batch = {embedder.input_key: embedder.example(1, (8, 8, 4)) for embedder in embedders.values()}
    windows = init_embedders(embedders, batch, jax.random.key(0), trainable=False)
    plain = towers()
    batch = {embedder.input_key: embedder.example(1, (8, 8, 4)) for embedder in plain.values()}
    alone = init_embedders(plain, batch, jax.random.key(0), trainable=False)
    jax.tree.map(np.testing.assert_array_equal, windows, alone)
    assert plain["l"].input_key == "caption_tokens_eos77"


def test_shapes_and_small_parts():
    assert token_shape(77) == (77,)
    assert token_shape(77, 2) == (2, 77)
    assert token_shape(77, 1, weighted=True) == (1, 77, 2)
    tokens = jnp.asarray(texts(2))
    np.testing.assert_array_equal(first_window(tokens), tokens[:, 0])
    np.testing.assert_array_equal(first_window(tokens[:, 0]), tokens[:, 0])
    np.testing.assert_array_equal(
        first_window(jnp.asarray(with_weights(texts(1), 1.0)))[:, 0], [START, START]
    )
    assert null_tokens(np.zeros(77, np.int32), jnp.zeros((1, 2, 77, 2))).shape == (77, 2)
    np.testing.assert_array_equal(encode_windows(lambda x: x + 1, jnp.zeros((1, 3))), [[1, 1, 1]])
