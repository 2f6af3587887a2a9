"""What a host batch lacks and embedders read is made of what the batch has."""

import numpy as np
import pytest

from diffusion_jax.experiment.host_inputs import add_inputs
from diffusion_jax.experiment.text import tokenizers_of
from diffusion_jax.models.conditioning.embedders import numbers, transformer_text

TEXT = transformer_text(width=8, num_layers=1)
SIZES = numbers(input_key="sizes", default="size")
CROPS = numbers(input_key="crops", default=(0, 3))
EMBEDDERS = {"text": TEXT, "sizes": SIZES, "crops": CROPS}
TOKENIZE = tokenizers_of(EMBEDDERS)
CAPTIONS = np.array(["a fox", "two foxes"])
IMAGES = np.zeros((2, 6, 4, 3), np.float32)


def test_texts_become_tokens_and_the_size_is_the_one_of_the_image():
    found = add_inputs(EMBEDDERS, TOKENIZE, {"image": IMAGES, "caption": CAPTIONS})
    np.testing.assert_array_equal(found["sizes"], [[6, 4]] * 2)
    np.testing.assert_array_equal(found["crops"], [[0, 3]] * 2)
    tokens = found[TEXT.input_key]
    (tokenizer,) = (tokens_of for _, tokens_of in TOKENIZE.values())
    np.testing.assert_array_equal(tokens, tokenizer(list(CAPTIONS)))
    assert found["image"] is IMAGES


def test_what_the_batch_has_stays():
    own = {TEXT.input_key: np.ones((2, 77), np.int32), "crops": np.full((2, 2), 7)}
    found = add_inputs(EMBEDDERS, TOKENIZE, {"image": IMAGES, "caption": CAPTIONS, **own})
    for name, value in own.items():
        assert found[name] is value


def test_latents_tell_the_size_of_the_image_that_they_were_encoded_from():
    batch = {"moments": np.zeros((3, 2, 2, 8)), "target_size": np.array([[16, 24]] * 3)}
    found = add_inputs({"sizes": SIZES}, {}, batch)
    np.testing.assert_array_equal(found["sizes"], [[16, 24]] * 3)


def test_a_text_whose_outputs_are_cached_needs_no_tokens():
    cached = {"image": IMAGES, "caption": CAPTIONS, "cached/text/0": np.zeros((2, 77, 8))}
    assert TEXT.input_key not in add_inputs(EMBEDDERS, TOKENIZE, cached)


@pytest.mark.parametrize("given", [{}, {"hint": np.ones((2, 6, 4, 1))}])
def test_a_hint_is_made_of_the_image_where_none_is_given(given):
    edges = SIZES._replace(
        input_key="hint", default=None, made_of_image=lambda image: image.mean(-1, keepdims=True)
    )
    found = add_inputs({"edges": edges}, {}, {"image": IMAGES + 0.5, **given})
    want = given["hint"] if given else np.full((2, 6, 4, 1), 0.5)
    np.testing.assert_array_equal(found["hint"], want)
