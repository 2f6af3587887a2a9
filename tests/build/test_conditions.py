"""What a user asks for becomes embedder inputs, or one sentence."""

import numpy as np
import pytest

from diffusion_jax.build.conditions import encode_conditions
from diffusion_jax.build.network import Network
from diffusion_jax.models.conditioner import class_label, concat_image

LABELLED = Network(None, {"label": class_label(num_classes=3)}, "adm", (8, 8, 1))
PLAIN = Network(None, {}, "none", (8, 8, 1))
BOTH = LABELLED._replace(
    embedders=LABELLED.embedders | {"low": concat_image(input_key="low", channels=1)}
)


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
        (BOTH, {"label": [1], "low": np.zeros((2, 8, 8, 1))}, None, "different lengths"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(network, conditions, n, message):
    with pytest.raises(ValueError, match=message):
        encode(network, conditions, n)
