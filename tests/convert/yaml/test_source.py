"""Config files as text: what they hold when they are run, and how they are laid out."""

import ast

import ml_collections
import pytest

from diffusion_jax.convert.yaml.source import WIDTH, config_source, literal

DEEP = {
    "name": "unet",
    "channel_mult": (1, 2, 4, 4),
    "inner": {"a": 1.5, "b": None, "c": {"x-y": True, "class": "it's"}},
    "long": tuple(range(10_000, 10_020)),
    "one": (3,),
    "empty": (),
    "inf": float("inf"),
    "words": 'say "no"',
}


def run(source):
    names = {}
    exec(compile(source, "config.py", "exec"), names)
    return names["get_config"]


def test_the_file_gives_back_what_was_written():
    sections = {"seed": 7, "data": {"n": 1}, "model": DEEP, "empty": {}}
    get_config = run(config_source("A model.\n\nWith words.", sections))
    assert get_config().to_dict() == sections
    assert isinstance(get_config().model.inner, ml_collections.ConfigDict)
    with pytest.raises(ValueError, match="variant 'x' is unknown"):
        get_config("x")


def test_lines_are_short_and_nothing_is_broken_without_need():
    source = config_source("A model.", {"model": DEEP, "train": {"num_steps": 10_000}})
    lines = source.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "    config.train = d(dict(num_steps=10_000))" in lines
    assert lines[lines.index("    config.train = d(dict(num_steps=10_000))") - 1] == ""
    assert ast.get_docstring(ast.parse(source)) == "A model."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9_999, "9999"),
        (10_000, "10_000"),
        (-123_456, "-123_456"),
        (True, "True"),
        (1e-4, "0.0001"),
        (float("-inf"), 'float("-inf")'),
        ("it's", '"it\'s"'),
        ('say "no"', "'say \"no\"'"),
        ((1,), "(1,)"),
        ({"a": 1, "b": (2, "x")}, 'dict(a=1, b=(2, "x"))'),
        ({"a-b": 1, "c": 2}, '{"a-b": 1, "c": 2}'),
        ({"class": 1}, '{"class": 1}'),
    ],
)
def test_values_as_python_has_them(value, text):
    assert literal(value) == text
    assert eval(text) == value
