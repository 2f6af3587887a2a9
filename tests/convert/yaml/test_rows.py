"""Rows of a table: options that keep their names, that mean the same anyway, that have no place."""

import pytest

from diffusion_jax.convert.yaml.reading import root_node
from diffusion_jax.convert.yaml.rows import (
    As,
    Class,
    Drop,
    Only,
    convert_class,
    convert_options,
    drop,
    keep,
)

TABLE = {
    "ch": As("model_channels"),
    "eta": As("eta", 0.0),
    "legacy": Only((False, "no"), "only the new order exists"),
    "verbose": Drop("nothing is printed"),
}


def test_an_option_gets_our_name_and_a_default_only_where_ours_differs():
    node = root_node({"ch": 3})
    assert convert_options(node, TABLE) == {"model_channels": 3, "eta": 0.0}
    assert convert_options(root_node({"eta": 1.5}), TABLE) == {"eta": 1.5}
    assert convert_options(root_node({}), keep("a b", c=2)) == {"c": 2}
    assert convert_options(root_node({"a": 1, "c": 3, "x": 9}), keep("a b", c=2)) == {
        "a": 1,
        "c": 3,
    }


@pytest.mark.parametrize("value", [False, "no", None])
def test_a_value_that_asks_for_what_happens_anyway_is_taken_in_silence(value):
    node = root_node({"legacy": value})
    assert convert_options(node, TABLE) == {"eta": 0.0}
    assert node.notes == {} and "legacy" in node.seen


def test_what_has_no_counterpart_is_noted_with_its_reason():
    node = root_node({"legacy": True, "verbose": False})
    convert_options(node, TABLE)
    assert node.notes == {"legacy": "only the new order exists", "verbose": "nothing is printed"}
    assert not {"legacy", "verbose"} & node.seen
    assert drop("a b", "why") == {"a": Drop("why"), "b": Drop("why")}


def test_a_class_becomes_the_name_of_its_row():
    table = {"EulerSampler": Class("euler", keep("s_churn")), "Heun": Class("heun")}
    node = root_node({"target": "sgm.sampling.EulerSampler", "params": {"s_churn": 2.0}})
    assert convert_class(node, table, "sampler") == {"name": "euler", "s_churn": 2.0}
    assert {"target", "params.s_churn"} <= node.seen
    other = root_node({"target": "my.Sampler", "params": {"x": 1}})
    assert convert_class(other, table, "sampler") is None
    assert other.notes == {"target": "Sampler is no sampler of ours; there are EulerSampler, Heun"}
