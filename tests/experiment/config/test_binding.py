"""Config sections are checked against signatures: every mistake is told with path, value and
choices."""

from typing import Literal, NamedTuple

import pytest

from diffusion_jax.experiment.config.binding import (
    ConfigError,
    bind,
    check_type,
    known_sections,
    options,
    pick,
)


def function(
    given,
    a: int,
    *,
    b: float = 1.0,
    c: Literal["x", "y"] = "x",
    d: tuple[int, ...] = (1,),
    e: int | None = None,
):
    del given, a, b, c, d, e


def test_bind_returns_what_the_section_says_and_nothing_else():
    section = {"name": "row", "a": 1, "b": 2, "d": [1, 2], "e": None}
    assert bind(function, section, "config.m", given=("given",)) == {
        "a": 1,
        "b": 2,
        "d": (1, 2),  # saved configs hold lists; networks need tuples
        "e": None,
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"a": "q"}, r"config\.m\.a = 'q' should be int"),
        ({"a": True}, r"config\.m\.a = True should be int"),
        ({"a": 1.5}, r"config\.m\.a = 1\.5 should be int"),
        ({"b": 2.0}, r"config\.m\.a is missing"),
        ({"a": 1, "c": "z"}, r"config\.m\.c = 'z' should be one of 'x', 'y'"),
        (
            {"a": 1, "dd": 3},
            r"config\.m\.dd = 3 is not an option; did you mean 'd'\? choose from a, b, c, d, e",
        ),
        ({"a": 1, "e": 1.5}, r"config\.m\.e = 1\.5 should be int or None"),
        ({"a": 1, "d": 3}, r"config\.m\.d = 3 should be tuple\[int, \.\.\.\]"),
        ({"a": 1, "given": 3}, r"config\.m\.given = 3 is not an option"),
    ],
)
def test_bind_names_path_value_and_choices(section, message):
    with pytest.raises(ConfigError, match=message):
        bind(function, section, "config.m", given=("given",))


def test_bind_leaves_extra_options_to_a_function_that_takes_them():
    def takes_more(*, a: int = 1, **options):
        del a, options

    assert bind(takes_more, {"a": 2, "more": [3]}, "config.m") == {"a": 2, "more": (3,)}


def test_bind_reads_records():
    class Record(NamedTuple):
        a: int
        b: float = 0.5

    assert Record(**bind(Record, {"a": 3}, "config.r")) == Record(3, 0.5)


def test_pick_lists_the_rows():
    assert pick({"ddim": 1}, "ddim", "config.sampler.name") == 1
    with pytest.raises(
        ConfigError, match=r"config\.sampler\.name = 'dim'.*did you mean 'ddim'.*ddim, ddpm"
    ):
        pick({"ddim": 1, "ddpm": 2}, "dim", "config.sampler.name")


def test_known_sections_rejects_the_first_unknown_one():
    known_sections({"a": 1}, ("a", "b"))
    with pytest.raises(ConfigError, match=r"config\.modl is not a section; did you mean 'model'"):
        known_sections({"modl": 1}, ("model",))


def test_options_drops_the_name_only():
    assert options({"name": "x", "a": 1}) == {"a": 1}


def test_check_type_takes_ints_for_floats_but_not_flags():
    value = check_type(1, float, "config.x")
    assert value == 1.0 and isinstance(value, float)
    assert isinstance(check_type(1, int | None, "config.x"), int)
    with pytest.raises(ConfigError, match="should be float"):
        check_type(True, float, "config.x")
