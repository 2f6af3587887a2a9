"""Embedders: dropout with the stated rate, per sample; merging by rank; the unconditional half of
guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.models.conditioner import (
    class_embedding,
    class_label,
    concat_image,
    embed,
    init_embedders,
    low_resolution,
)

LABELS = {"label": jnp.arange(6, dtype=jnp.int32) % 3}


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
    embedders = {"label": class_embedding(num_classes=3, embed_dim=5)}
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
