"""One table says which numbers every option may hold, and binding keeps to it."""

import math

import pytest

from diffusion_jax.diffusion.samplers import ddim, euler
from diffusion_jax.experiment.config.binding import (
    ConfigError,
    bind,
    kinds_of,
    parameters_of,
    plain_type,
)
from diffusion_jax.experiment.config.catalogue import sections
from diffusion_jax.experiment.config.ranges import ANY, RANGES, Range, first_outside, range_of
from diffusion_jax.train.optimizer import OPTIMIZERS


def targets():
    """Every (section, function, what the caller supplies) of the catalogue."""
    for spec in sections().values():
        for function, given in spec.targets:
            yield spec, function, given
        for function in spec.table.values():
            yield spec, function, spec.given
        for extras in spec.extras.values():
            for function, given in extras:
                yield spec, function, given


def numeric():
    """Every numeric option: (path, function, name)."""
    return [
        (spec.path, function, name)
        for spec, function, given in targets()
        for name, parameter in parameters_of(function, given).items()
        if kinds_of(plain_type(parameter.annotation)) & {int, float}
    ]


@pytest.mark.parametrize(
    ("wanted", "right", "wrong", "words"),
    [
        (Range(1), (1, 2**31 - 1, 1.5), (0, -1, 2**31, math.nan, math.inf), "at least 1"),
        (Range(0, above=True), (1e-9, 3), (0, 0.0, -1, 1e300), "above 0"),
        (Range(0, 1), (0, 1, 0.5), (-0.1, 1.1, math.nan), "between 0 and 1"),
        (Range(0, 1, below=True), (0, 0.999), (1, 1.0, -1), "at least 0 and below 1"),
        (Range(0, 1, above=True), (1, 0.1), (0, 2), "above 0 and at most 1"),
        (Range(1, others=(-1,)), (-1, 1), (0, -2), "at least 1 or -1"),
        (Range(0, others=(math.inf,)), (0, math.inf), (-math.inf, math.nan), "at least 0 or inf"),
        (ANY, (-3e38, 0, 7), (math.nan, math.inf, 1e39, 10**30), ""),
    ],
)
def test_what_a_range_holds_and_says(wanted, right, wrong, words):
    assert [value for value in right if not wanted.holds(value)] == []
    assert [value for value in wrong if wanted.holds(value)] == []
    assert wanted.in_words() == words


def test_every_number_of_a_value_is_looked_at():
    assert first_outside((1, (2, 0)), Range(1)) == 0
    assert first_outside({"kl": 1.0, "x": -1.0}, Range(0)) == -1.0
    assert first_outside(("a", None, True, 3), Range(5)) == 3
    assert first_outside((1, 2), Range(1)) is None


def test_every_numeric_option_of_the_catalogue_has_a_range():
    names = {name.rpartition(".")[2] for name in RANGES}
    assert sorted({name for _, _, name in numeric()} - names) == []
    scoped = {f"{function.__name__}.{name}" for _, function, name in numeric()}
    plain = {name for _, _, name in numeric()}
    assert sorted(set(RANGES) - scoped - plain) == [], "rows that no option has"


def test_no_default_is_outside_of_its_range():
    for path, function, name in numeric():
        default = parameters_of(function)[name].default
        wrong = first_outside(default, range_of(function, name))
        assert wrong is None, f"{path} {function.__name__}.{name} = {default}"


def test_one_name_may_mean_two_things():
    assert range_of(ddim, "eta") == Range(0, 1)
    assert range_of(euler, "s_churn") == Range(0)
    assert range_of(OPTIMIZERS["optimistic_gradient_descent"], "beta").holds(1.0)
    assert not range_of(OPTIMIZERS["signum"], "beta").holds(1.0)


def test_functions_of_the_user_take_any_number():
    def net(*, num_groups: int = 3, dropout: float = 0.0):
        del num_groups, dropout

    assert range_of(net, "num_groups") is None
    assert bind(net, {"num_groups": 0, "dropout": 7}, "config.model") == {
        "num_groups": 0,
        "dropout": 7.0,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("b2", 1.5, r"config\.optimizer\.b2 = 1\.5 should be at least 0 and below 1$"),
        ("b2", math.nan, r"b2 = nan should be at least 0 and below 1, finite and within 32 bits"),
        ("weight_decay", math.nan, r"weight_decay = nan should be at least 0, finite and"),
        ("eps", 10**400, r"eps = 10+\.\.\. should be finite and within 32 bits$"),
        ("b1", True, r"b1 = True should be float"),
        ("mu_dtype", "float8", r"mu_dtype = 'float8' is unknown; did you mean 'float32'"),
        ("mu_dtype", 3, r"mu_dtype = 3 is unknown"),
    ],
)
def test_binding_keeps_to_the_table(name, value, message):
    with pytest.raises(ConfigError, match=message):
        bind(OPTIMIZERS["adamw"], {name: value}, "config.optimizer", given=("learning_rate",))


def test_numbers_of_optax_are_plain_numbers():
    given = ("learning_rate",)
    with pytest.raises(ConfigError, match=r"o\.b1 = 'x' should be int or float$"):
        bind(OPTIMIZERS["lion"], {"b1": "x"}, "o", given=given)
    with pytest.raises(ConfigError, match=r"o\.b1 = True should be int or float$"):
        bind(OPTIMIZERS["lion"], {"b1": True}, "o", given=given)
    with pytest.raises(
        ConfigError, match=r"o\.betas = \(0\.9, 1\) should be at least 0 and below 1 each"
    ):
        bind(OPTIMIZERS["prodigy"], {"betas": (0.9, 1)}, "o", given=given)
    assert bind(OPTIMIZERS["lion"], {"mu_dtype": None}, "o", given=given) == {"mu_dtype": None}
