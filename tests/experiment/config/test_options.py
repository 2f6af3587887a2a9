"""Records of options: every default is of the type that its own section would accept."""

import typing

import pytest

from diffusion_jax.experiment.config import options
from diffusion_jax.experiment.config.binding import check_type

RECORDS = [
    value
    for value in vars(options).values()
    if isinstance(value, type) and issubclass(value, tuple) and value is not typing.NamedTuple
]


@pytest.mark.parametrize("record", RECORDS)
def test_defaults_are_what_a_config_may_say(record):
    kinds = typing.get_type_hints(record)
    for name, default in record._field_defaults.items():
        assert check_type(default, kinds[name], name) == default


def test_what_has_no_default_has_to_be_given():
    required = {
        (record.__name__, name)
        for record in RECORDS
        for name in record._fields
        if name not in record._field_defaults
    }
    assert len(RECORDS) >= 14 and required == {
        ("LatentCacheOptions", "folder"),
        ("AutoguidanceOptions", "path"),
        ("PriorOptions", "prompt"),
        ("NewTokenOptions", "init"),
        ("PromptOptions", "prompts"),
    }
