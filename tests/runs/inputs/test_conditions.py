"""What a user asks for becomes embedder inputs, or one sentence."""

import numpy as np
import pytest

from diffusion_jax.experiment.network.network import Network
from diffusion_jax.experiment.network.text import tokenizers_of
from diffusion_jax.models.conditioning.embedders import (
    class_label,
    concat_image,
    numbers,
    transformer_text,
)
from diffusion_jax.runs.inputs.conditions import encode_conditions, encode_negative

LABELLED = Network(None, {"label": class_label(num_classes=3)}, "adm", (8, 8, 1))
PLAIN = Network(None, {}, "none", (8, 8, 1))
BOTH = LABELLED._replace(
    embedders=LABELLED.embedders | {"low": concat_image(input_key="low", channels=1)}
)

EMBEDDERS = {
    "text": transformer_text(width=8, num_layers=1),
    "sizes": numbers(input_key="sizes", default="size"),
    "crops": numbers(input_key="crops", default=(0, 0)),
}
TEXT = Network(None, EMBEDDERS, "none", (8, 8, 1), tokenize=tokenizers_of(EMBEDDERS))


def encode(network, conditions, n=None):
    return encode_conditions(network, conditions, n, lambda: ("cat", "dog", "fox"))


def test_numbers_names_and_repeats():
    inputs, count = encode(LABELLED, [2, "cat", "1"])
    np.testing.assert_array_equal(inputs["label"], [2, 0, 1])
    assert count == 3 and inputs["label"].dtype == np.int32
    np.testing.assert_array_equal(encode(LABELLED, ["fox"], 4)[0]["label"], [2, 2, 2, 2])
    np.testing.assert_array_equal(encode(LABELLED, 1, 2)[0]["label"], [1, 1])


def test_unconditional_models_take_a_number_only():
    assert encode(PLAIN, None, 5) == ({}, 5)
    assert encode(PLAIN, None) == ({}, 1)


def test_several_inputs_come_by_name():
    inputs, count = encode(BOTH, {"label": [0, 1], "low": np.zeros((2, 8, 8, 1))})
    assert count == 2 and set(inputs) == {"label", "low"}


@pytest.mark.parametrize(
    ("network", "conditions", "n", "message"),
    [
        (LABELLED, [3], None, "class 3 is out of range; this model has the classes 0 to 2"),
        (LABELLED, ["-1"], None, "class -1 is out of range"),
        (LABELLED, [1.7], None, "class 1.7 should be a whole number or a name"),
        (LABELLED, [True], None, "class True should be a whole number or a name"),
        (LABELLED, ["wolf"], None, "class 'wolf' is unknown; choose from cat, dog, fox"),
        (LABELLED, None, 3, "this model is conditional: give one label for each image"),
        (LABELLED, [0, 1], 3, "n = 3 does not fit 2 conditions"),
        (LABELLED, [], None, "n = 0 should be at least 1 image"),
        (PLAIN, [1], None, "this model is unconditional"),
        (PLAIN, None, 0, "n = 0 should be at least 1 image"),
        (BOTH, [1], None, "several conditions: give a dict with the keys label, low"),
        (BOTH, {"label": [1]}, None, r"'low' needs conditions\['low'\]"),
        (BOTH, {"lable": [1]}, None, r"conditions\['lable'\] is no input; choose from label, low"),
        (TEXT, [3], None, "caption = 3 should be a text"),
        (
            TEXT,
            "x" * 40_000,
            None,
            r"'xxxx.*\(40000 characters\) has \d+ tokens; a prompt has at most 1200",
        ),
        (
            TEXT,
            {"caption": ["a"], "sizes": [[1, 2, 3]]},
            None,
            r"shape \(1, 3\); it should be \(2,\)",
        ),
        (BOTH, {"label": [1] * 3, "low": np.zeros((2, 8, 8, 1))}, None, "different lengths"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(network, conditions, n, message):
    with pytest.raises(ValueError, match=message):
        encode(network, conditions, n)


def test_a_prompt_is_tokenized_and_sizes_have_defaults():
    inputs, count = encode_conditions(TEXT, "a photo of a cat", 2, tuple, (64, 96))
    assert count == 2
    tokens = inputs[EMBEDDERS["text"].input_key]
    np.testing.assert_array_equal(tokens[:, :8], [[49406, 320, 1125, 539, 320, 2368, 49407, 0]] * 2)
    np.testing.assert_array_equal(inputs["sizes"], [[64, 96]] * 2)
    np.testing.assert_array_equal(inputs["crops"], [[0, 0]] * 2)
    given = {"caption": ["a cat", "a dog"], "sizes": [10, 20]}
    inputs, count = encode_conditions(TEXT, given, None, tuple, (64, 96))
    assert count == 2 and inputs["sizes"].tolist() == [[10, 20]] * 2


@pytest.mark.parametrize("given", [2.5, [2.5, 2.5], [[2.5], [2.5]]])
def test_single_numbers_may_be_given_as_they_are(given):
    network = Network(None, {"score": numbers(input_key="score", size=1)}, "none", (8, 8, 1))
    n = 2 if np.ndim(given) == 0 else None
    inputs, count = encode_conditions(network, {"score": given}, n, tuple)
    assert count == 2 and inputs["score"].tolist() == [[2.5], [2.5]]


def test_a_negative_prompt_is_for_the_texts_or_what_it_names():
    assert encode_negative(TEXT, None, 3) is None
    key = EMBEDDERS["text"].input_key
    plain = encode_negative(TEXT, "blurry", 3)
    assert set(plain) == {key} and plain[key].shape == (3, 77)
    both = encode_negative(TEXT, {"caption": "blurry", "sizes": (5, 5)}, 2)
    assert set(both) == {key, "sizes"} and both["sizes"].tolist() == [[5, 5]] * 2
    with pytest.raises(ValueError, match="there are 2 negative conditions for 3 images"):
        encode_negative(TEXT, ["a", "b"], 3)
    with pytest.raises(ValueError, match=r"negative\['x'\] is no input"):
        encode_negative(TEXT, {"x": 1}, 3)
    with pytest.raises(ValueError, match="should be a dict by input: this model reads 0 texts"):
        encode_negative(LABELLED, "blurry", 3)
