"""Prompts of any length: windows, weights, and equal lengths in a call."""

import numpy as np
import pytest

from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.text import tokenizers_of
from diffusion_jax.models.conditioning.embedders import transformer_text
from diffusion_jax.runs.inputs.conditions import encode_conditions, encode_negative
from diffusion_jax.runs.inputs.prompts import MOST_WINDOWS, alike, tokens_of

EOS = {"text": transformer_text(width=8, num_layers=1)}
EMBEDDERS = {**EOS, "trained": transformer_text(width=8, num_layers=1, windows=2)}
TEXT = Network(None, EOS, "none", (8, 8, 1), tokenize=tokenizers_of(EOS))
(KEY,) = TEXT.tokenize
TOKENIZE = TEXT.tokenize[KEY][1]
LONG = "word " * 80


def call(prompts, negative=None, weighted=None, network=TEXT):
    inputs, count = encode_conditions(network, prompts, None, tuple, weighted=weighted)
    away = encode_negative(network, negative, count, weighted=weighted)
    return alike(network, inputs, away)


def test_plain_prompts_are_as_they_always_were_whatever_is_asked():
    for weighted in (None, False, True):
        inputs, negative = call(["a red fox", ""], "blurry", weighted)
        assert inputs[KEY].dtype == np.int32
        np.testing.assert_array_equal(inputs[KEY], TOKENIZE(["a red fox", ""]))
        np.testing.assert_array_equal(negative[KEY], TOKENIZE(["blurry"] * 2))
    inputs, negative = call(["a (red:1.3) fox"])
    np.testing.assert_array_equal(inputs[KEY], TOKENIZE(["a (red:1.3) fox"]))
    assert negative is None


def test_a_long_prompt_continues_in_windows_and_the_others_of_its_call_are_filled_up():
    inputs, negative = call([LONG, "a fox"], "blurry")
    word = TOKENIZE(["word"])[0, 1]
    assert inputs[KEY].shape == (2, 2, 77) and negative[KEY].shape == (2, 2, 77)
    np.testing.assert_array_equal(inputs[KEY][0, :, 1:6], np.full((2, 5), word))
    np.testing.assert_array_equal(inputs[KEY][0, 1], TOKENIZE(["word " * 5])[0])
    np.testing.assert_array_equal(inputs[KEY][1], TOKENIZE(["a fox", ""]))
    np.testing.assert_array_equal(negative[KEY][0], TOKENIZE(["blurry", ""]))
    inputs, negative = call("a fox", LONG)
    np.testing.assert_array_equal(inputs[KEY][0], TOKENIZE(["a fox", ""]))
    assert negative[KEY].shape == (1, 2, 77)


def test_weights_stand_beside_their_tokens():
    inputs, negative = call("a (red:1.5) fox", "blurry", weighted=True)
    assert inputs[KEY].shape == (1, 1, 77, 2) and inputs[KEY].dtype == np.float32
    np.testing.assert_array_equal(inputs[KEY][0, 0, :, 0], TOKENIZE(["a red fox"])[0])
    np.testing.assert_array_equal(inputs[KEY][0, 0, :6, 1], [1, 1, 1.5, 1, 1, 1])
    np.testing.assert_array_equal(negative[KEY][0, 0, :, 1], np.ones(77))


def test_a_model_that_was_trained_with_windows_reads_as_many():
    network = TEXT._replace(
        embedders={"trained": EMBEDDERS["trained"]},
        tokenize=tokenizers_of({"trained": EMBEDDERS["trained"]}),
    )
    (key,) = network.tokenize
    assert call("a fox", network=network)[0][key].shape == (1, 2, 77)
    assert call("word " * 160, network=network)[0][key].shape == (1, 3, 77)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([3], "caption = 3 should be a text"),
        (["word " * 2000], "has 2000 tokens; a prompt has at most 1200, so make it shorter"),
    ],
)
def test_what_is_no_prompt_is_told(texts, message):
    assert MOST_WINDOWS * 75 == 1200
    with pytest.raises(ValueError, match=message):
        tokens_of(TOKENIZE, "caption", texts, None)
