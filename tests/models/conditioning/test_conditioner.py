"""Embedders: dropout with the stated rate, per sample; merging by rank; the unconditional half of
guidance."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioning.conditioner import Embedder, embed
from diffusion_jax.models.conditioning.conditioner import init_embedders as init_some
from diffusion_jax.models.conditioning.embedders import (
    class_embedding,
    class_label,
    concat_image,
    features,
    low_resolution,
    numbers,
)
from diffusion_jax.models.layers.basic import timestep_embedding

LABELS = {"label": jnp.arange(6, dtype=jnp.int32) % 3}


def init_embedders(embedders, batch, key):
    return init_some(embedders, batch, key, trainable=True)


def keys(seed, count):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def test_labels_pass_through_and_become_null_when_dropped():
    embedders = {"label": class_label(num_classes=3, ucg_rate=1.0)}
    kept = embed(embedders, {}, LABELS)
    np.testing.assert_array_equal(kept["vector"], LABELS["label"])
    for dropped in (
        embed(embedders, {}, LABELS, keys(0, 6)),
        embed(embedders, {}, LABELS, unconditional=True),
    ):
        np.testing.assert_array_equal(dropped["vector"], np.full(6, 3))


def test_dropout_rate_is_the_stated_one_and_a_function_of_the_samples_key():
    count = 4000
    embedders = {"label": class_label(num_classes=3, ucg_rate=0.2)}
    batch = {"label": jnp.zeros(count, jnp.int32)}
    dropped = np.asarray(embed(embedders, {}, batch, keys(1, count))["vector"]) == 3
    assert abs(dropped.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / count)
    half = {"label": batch["label"][: count // 2]}
    again = np.asarray(embed(embedders, {}, half, keys(1, count)[: count // 2])["vector"]) == 3
    np.testing.assert_array_equal(again, dropped[: count // 2])


def test_two_embedders_drop_independently():
    count = 2000
    embedders = {
        "a": class_embedding(num_classes=3, embed_dim=2, add_sequence_dim=False, ucg_rate=0.5),
        "b": class_embedding(
            num_classes=3, embed_dim=2, add_sequence_dim=False, ucg_rate=0.5, input_key="other"
        ),
    }
    batch = {"label": jnp.zeros(count, jnp.int32), "other": jnp.zeros(count, jnp.int32)}
    params = init_embedders(embedders, batch, jax.random.key(0))
    vector = np.asarray(embed(embedders, params, batch, keys(2, count))["vector"])
    assert vector.shape == (count, 4)
    null_a = np.isclose(vector[:, 0], params["a"]["embedding"]["embedding"][3, 0])
    null_b = np.isclose(vector[:, 2], params["b"]["embedding"]["embedding"][3, 0])
    assert abs(np.corrcoef(null_a, null_b)[0, 1]) < 0.1


def test_class_embedding_is_a_table_lookup_with_a_null_row():
    embedders = {"label": class_embedding(num_classes=3, embed_dim=5, ucg_rate=0.1)}
    params = init_embedders(embedders, LABELS, jax.random.key(0))
    table = params["label"]["embedding"]["embedding"]
    assert table.shape == (4, 5)
    np.testing.assert_array_equal(
        embed(embedders, params, LABELS)["crossattn"][:, 0], table[LABELS["label"]]
    )
    null = embed(embedders, params, LABELS, unconditional=True)["crossattn"][:, 0]
    np.testing.assert_array_equal(null, np.broadcast_to(table[3], (6, 5)))


def test_dropped_images_are_zero():
    embedders = {"low": concat_image(input_key="low", channels=2, ucg_rate=0.5)}
    batch = {"low": jnp.ones((6, 4, 4, 2))}
    kept = embed(embedders, {}, batch)["concat"]
    np.testing.assert_array_equal(kept, batch["low"])
    some = np.asarray(embed(embedders, {}, batch, keys(0, 6))["concat"]).reshape(6, -1)
    assert {0.0, 1.0} == set(np.unique(some)) and np.all(some == some[:, :1])
    assert not np.any(embed(embedders, {}, batch, unconditional=True)["concat"])


def test_low_resolution_keeps_block_means_of_smooth_images_and_nothing_finer():
    embedders = {"low": low_resolution(factor=4, channels=1)}
    ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 16)[None, :, None, None], (2, 16, 16, 1))
    checker = (jnp.indices((16, 16)).sum(0) % 2 * 2.0 - 1.0)[None, :, :, None]
    low = embed(embedders, {}, {"image": ramp})["concat"]
    np.testing.assert_allclose(low[:, 4:12], ramp[:, 4:12], atol=0.05)
    np.testing.assert_allclose(embed(embedders, {}, {"image": checker})["concat"], 0.0, atol=1e-6)


def test_missing_input_names_the_embedder_and_what_there_is():
    with pytest.raises(ValueError, match="embedder 'label' reads 'label'.*it has image"):
        embed({"label": class_label(num_classes=3)}, {}, {"image": jnp.zeros((1, 2, 2, 1))})


def test_labels_cannot_be_joined_to_features():
    embedders = {
        "a": class_label(num_classes=3),
        "b": class_embedding(num_classes=3, embed_dim=2, add_sequence_dim=False),
    }
    params = init_embedders(embedders, LABELS, jax.random.key(0))
    with pytest.raises(ValueError, match="2 embedders meet in 'vector'"):
        embed(embedders, params, LABELS)


class Two(nn.Module):
    """Tokens and a pooled vector, like a text encoder."""

    def __call__(self, value):
        return jnp.ones((len(value), 3, 2)) * value[:, None, None], jnp.ones((len(value), 4))


def two(**options):
    return Embedder(Two(), "words", shape=(), dtype="float32", **options)


def test_outputs_of_one_embedder_go_where_their_ranks_say():
    batch = {"words": jnp.arange(5.0), "sizes": jnp.arange(10.0).reshape(5, 2)}
    embedders = {"text": two(), "more": two(), "sizes": numbers(input_key="sizes", outdim=6)}
    conditioning = embed(embedders, {}, batch)
    assert conditioning["crossattn"].shape == (5, 3, 4)  # features are joined, not tokens
    assert conditioning["vector"].shape == (5, 4 + 4 + 12)
    np.testing.assert_array_equal(
        conditioning["vector"][:, 8:14], timestep_embedding(batch["sizes"][:, 0], 6)
    )


def test_outputs_are_dropped_alone_and_groups_together():
    count = 2000
    batch = {"words": jnp.ones(count)}
    alone = embed({"text": two(ucg_rate=0.5)}, {}, batch, keys(0, count))
    tokens, pooled = alone["crossattn"][:, 0, 0], alone["vector"][:, 0]
    assert abs(np.corrcoef(tokens, pooled)[0, 1]) < 0.1
    group = {name: two(ucg_rate=0.5, ucg_group="text") for name in ("a", "b")}
    together = embed(group, {}, batch, keys(0, count))
    found = np.concatenate([together["crossattn"][:, 0], together["vector"]], axis=1)
    assert np.all(found == found[:, :1]) and 0.4 < found.mean() < 0.6


def test_cached_outputs_are_dropped_as_computed_ones_are():
    """Each output on its own draw; all in one where one null input gives them all."""
    count = 400
    words = jnp.arange(1.0, count + 1)
    tokens, pooled = Two().apply({}, words)
    cached = {"cached/text/0": tokens, "cached/text/1": pooled}
    zeros = {"cached/text/0": jnp.zeros((3, 2)), "cached/text/1": jnp.zeros(4)}
    for embedder in (two(ucg_rate=0.5), two(ucg_rate=0.5, ucg_group="a")):
        computed = embed({"text": embedder}, {}, {"words": words}, keys(0, count))
        found = embed({"text": embedder}, {}, cached, keys(0, count), null_outputs=zeros)
        jax.tree.map(np.testing.assert_array_equal, found, computed)
    lost = [np.asarray(alone)[:, 0] == 0 for alone in (found["crossattn"][..., 0], found["vector"])]
    np.testing.assert_array_equal(*lost)  # of one group
    found = embed({"text": two(ucg_rate=0.5)}, {}, cached, keys(0, count), null_outputs=zeros)
    lost = [np.asarray(alone)[:, 0] == 0 for alone in (found["crossattn"][..., 0], found["vector"])]
    assert 0.3 < np.mean(lost[0] != lost[1]) < 0.7


def test_the_unconditional_half_keeps_what_is_never_dropped_and_negative_prompts():
    batch = {"words": jnp.ones(2), "sizes": jnp.ones((2, 2))}
    embedders = {"text": two(ucg_rate=0.1), "sizes": numbers(input_key="sizes", outdim=4)}
    null = embed(embedders, {}, batch, unconditional=True)
    assert not np.any(null["crossattn"]) and not np.any(null["vector"][:, :4])
    assert np.any(null["vector"][:, 4:])
    negative = {**batch, "words": jnp.full(2, 7.0)}
    kept = embed(embedders, {}, negative, unconditional=True, kept=("text",))
    assert np.all(kept["crossattn"] == 7.0)
    zero = embed(embedders, {}, negative, unconditional=True, kept=("text",), force_zero=("text",))
    assert not np.any(zero["crossattn"])


def test_a_null_input_may_be_a_row_of_tokens():
    null = np.array([1, 2, 2], np.int32)
    embedder = features(input_key="tokens", shape=(3,), dtype="int32", ucg_rate=1.0)
    tokens = {"tokens": jnp.zeros((4, 3), jnp.int32)}
    embedders = {"text": embedder._replace(null_value=null)}
    for dropped in (
        embed(embedders, {}, tokens, keys(0, 4)),
        embed(embedders, {}, tokens, unconditional=True),
    ):
        np.testing.assert_array_equal(dropped["vector"], np.tile(null, (4, 1)))


def test_frozen_embedders_have_their_own_parameters():
    embedders = {
        "a": class_embedding(num_classes=3, embed_dim=2),
        "b": class_embedding(num_classes=3, embed_dim=2, trainable=False),
    }
    key = jax.random.key(0)
    assert set(init_some(embedders, LABELS, key, trainable=True)) == {"a"}
    assert set(init_some(embedders, LABELS, jax.random.key(0), trainable=False)) == {"b"}


def test_outputs_that_cannot_be_joined_are_told():
    embedders = {
        "a": features(input_key="a", shape=(3, 2)),
        "b": features(input_key="b", shape=(4, 2)),
    }
    batch = {"a": jnp.zeros((1, 3, 2)), "b": jnp.zeros((1, 4, 2))}
    with pytest.raises(ValueError, match=r"meet in 'crossattn'.*\(1, 3, 2\), \(1, 4, 2\)"):
        embed(embedders, {}, batch)


def test_a_group_may_lose_one_or_both():
    """A draw below 0.2 loses a, from 0.1 to 0.3 b: a tenth loses a alone, b alone, and both."""
    count = 4000
    batch = {"x": jnp.ones((count, 2, 2, 1)), "y": jnp.ones((count, 2, 2, 1))}
    embedders = {
        "a": concat_image(input_key="x", channels=1, ucg_rate=0.2, ucg_group="g"),
        "b": concat_image(input_key="y", channels=1, ucg_rate=0.2, ucg_group="g", ucg_from=0.1),
    }
    kept = np.asarray(embed(embedders, {}, batch, keys(5, count))["concat"])[:, 0, 0]
    for pattern, share in (((0, 1), 0.1), ((1, 0), 0.1), ((0, 0), 0.1), ((1, 1), 0.7)):
        assert abs((kept == pattern).all(1).mean() - share) < 0.02
