"""What embedders read is made of what a batch has; what it has already stays."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.experiment.network.host_inputs import add_inputs
from diffusion_jax.experiment.network.text import tokenizers_of
from diffusion_jax.models.conditioning.conditioner import Embedder, Identity, name_outputs
from diffusion_jax.models.conditioning.embedders import class_label, numbers, transformer_text

TEXT = {"text": transformer_text(width=8, num_layers=1)}
SIZES = {
    "size": numbers(input_key="original_size", default="size"),
    "crop": numbers(input_key="crop", default=(3, 4)),
}
HINT = {"hint": Embedder(Identity(), "hint", channels=3, made_of_image=lambda images: 1.0 - images)}
IMAGES = np.zeros((2, 6, 8, 3), np.float32)


def test_texts_become_the_tokens_that_an_embedder_reads():
    tokenize, batch = tokenizers_of(TEXT), {"image": IMAGES, "caption": np.array(["a", "a fox"])}
    key = TEXT["text"].input_key
    made = add_inputs(TEXT, tokenize, batch)
    assert made.keys() == {"image", "caption", key}
    np.testing.assert_array_equal(made[key], tokenize[key][1](["a", "a fox"]))
    assert np.any(made[key][0] != made[key][1])
    given = {**batch, key: np.zeros((2, 77), np.int32)}
    assert add_inputs(TEXT, tokenize, given)[key] is given[key]


def test_cached_outputs_of_an_embedder_take_the_place_of_its_input():
    cached = name_outputs("text", [jnp.zeros((2, 77, 8))])
    batch = {"image": IMAGES, "caption": np.array(["a", "a fox"]), **cached}
    assert add_inputs(TEXT, tokenizers_of(TEXT), batch).keys() == batch.keys()


def test_nothing_is_tokenized_that_no_embedder_reads():
    batch = {"image": IMAGES, "caption": np.array(["a", "b"]), "label": np.array([0, 1])}
    labelled = {"label": class_label(num_classes=2)}
    assert add_inputs(labelled, tokenizers_of(TEXT), batch).keys() == batch.keys()


def test_hints_are_made_of_images_that_have_none():
    made = add_inputs(HINT, {}, {"image": IMAGES})
    np.testing.assert_array_equal(made["hint"], np.ones((2, 6, 8, 3)))
    own = np.full((2, 6, 8, 3), 0.5, np.float32)
    assert add_inputs(HINT, {}, {"image": IMAGES, "hint": own})["hint"] is own
    latents = {"moments": np.zeros((2, 3, 4, 8)), "target_size": np.array([[6, 8]] * 2)}
    assert "hint" not in add_inputs(HINT, {}, latents)


@pytest.mark.parametrize(
    "batch",
    [
        {"image": IMAGES},
        {"image": np.zeros((2, 5, 6, 8, 3), np.float32)},  # a clip of 5 frames
        {"moments": np.zeros((2, 3, 4, 8)), "target_size": np.array([[6, 8]] * 2)},
    ],
)
def test_what_is_not_said_has_its_default_and_size_is_the_size_of_the_images(batch):
    made = add_inputs(SIZES, {}, batch)
    np.testing.assert_array_equal(made["original_size"], [[6, 8], [6, 8]])
    np.testing.assert_array_equal(made["crop"], [[3, 4], [3, 4]])
    assert made["crop"].dtype == SIZES["crop"].dtype
    given = add_inputs(SIZES, {}, {**batch, "crop": np.ones((2, 2))})
    np.testing.assert_array_equal(given["crop"], np.ones((2, 2)))
