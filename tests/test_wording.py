"""What messages say of one thing and of many."""

import pytest

from diffusion_jax.wording import counted, few_of


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 layers have"), (1, "1 layer has"), (1200, "1,200 layers have")]
)
def test_one_thing_is_no_plural(number, text):
    assert counted(number, "layer has", "layers have") == text


def test_a_long_list_ends_with_how_many_more_there_are():
    assert few_of(["a", "b"]) == "a, b"
    assert few_of(["a", "b", "c"], 2) == "a, b and 1 more"
