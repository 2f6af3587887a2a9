"""The shapes that embedders give are found without computing, and by hand are the same."""

import jax.numpy as jnp
import pytest

from diffusion_jax.experiment.network.shapes import conditioning_shapes
from diffusion_jax.models.conditioning.embedders import (
    class_embedding,
    concat_image,
    features,
    numbers,
)


def test_entries_are_as_wide_as_what_meets_in_them():
    """Context 6 + 3 wide, vectors of 5 features and of 2 numbers of 4 features, 2 channels."""
    embedders = {
        "words": class_embedding(num_classes=4, embed_dim=6),
        "more": class_embedding(num_classes=4, embed_dim=3, input_key="more"),
        "kind": class_embedding(
            num_classes=4, embed_dim=5, add_sequence_dim=False, input_key="kind"
        ),
        "size": numbers(input_key="target_size", outdim=4),
        "low": concat_image(input_key="low", channels=2),
    }
    shapes = conditioning_shapes(embedders, (8, 8, 3))
    assert {name: shape.shape for name, shape in shapes.items()} == {
        "crossattn": (1, 1, 9),
        "vector": (1, 13),
        "concat": (1, 8, 8, 2),
    }
    assert {shape.dtype for shape in shapes.values()} == {jnp.dtype("float32")}
    assert conditioning_shapes({}, (8, 8, 3)) == {}


def test_contexts_of_different_lengths_cannot_be_joined():
    embedders = {
        "words": class_embedding(num_classes=4, embed_dim=6),
        "text": features(input_key="text", shape=(5, 3)),
    }
    with pytest.raises(ValueError, match=r"crossattn"):
        conditioning_shapes(embedders, (8, 8, 3))
