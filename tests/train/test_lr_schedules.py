"""Schedules against a direct recomputation in Python, at their seams, and under jit."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilations import times_compiled

from diffusion_jax.train.lr_schedules import LR_SCHEDULES, constant, with_warmup

ARGUMENTS = {
    "constant": {"value": 0.5},
    "linear": {"transition_steps": 10},
    "polynomial": {"transition_steps": 10, "power": 2.0},
    "cosine_decay": {"decay_steps": 10, "alpha": 0.1},
    "exponential_decay": {"transition_steps": 10, "decay_rate": 0.5},
    "warmup_constant": {"warmup_steps": 5},
    "warmup_cosine_decay": {"warmup_steps": 5, "decay_steps": 20},
    "warmup_exponential_decay": {"warmup_steps": 5, "transition_steps": 10, "decay_rate": 0.5},
    "piecewise_constant": {"boundaries": (5, 10), "scales": (0.5, 0.1)},
    "piecewise_interpolate": {"boundaries": (5, 10), "scales": (0.5, 0.1)},
    "linear_onecycle": {"transition_steps": 20},
    "cosine_onecycle": {"transition_steps": 20},
    "inverse_sqrt": {"reference_steps": 4},
    "lambda_warmup_cosine": {
        "warm_up_steps": 4,
        "lr_min": 0.1,
        "lr_max": 1.0,
        "lr_start": 0.01,
        "max_decay_steps": 20,
    },
    "lambda_warmup_cosine2": {
        "warm_up_steps": (4, 2),
        "f_min": (0.1, 0.2),
        "f_max": (1.0, 0.8),
        "f_start": (0.01, 0.05),
        "cycle_lengths": (10, 12),
    },
    "lambda_linear": {
        "warm_up_steps": (4, 2),
        "f_min": (0.1, 0.2),
        "f_max": (1.0, 0.8),
        "f_start": (0.01, 0.05),
        "cycle_lengths": (10, 12),
    },
}


def upstream(name, n, warm_up_steps, f_min, f_max, f_start, cycle_lengths):
    """The multiplier of latent-diffusion's cycle schedules, step by step in Python floats."""
    begin = 0
    for i, length in enumerate(cycle_lengths):
        if n <= begin + length or i == len(cycle_lengths) - 1:
            break
        begin += length
    n = min(n - begin, length)
    low, high, start, warm = f_min[i], f_max[i], f_start[i], warm_up_steps[i]
    if n < warm:
        return (high - start) / warm * n + start
    if name == "lambda_linear":
        return low + (high - low) * (length - n) / length
    t = min((n - warm) / (length - warm), 1.0)
    return low + 0.5 * (high - low) * (1 + math.cos(t * math.pi))


def values(schedule, steps):
    return np.array([float(schedule(int(n))) for n in steps])


@pytest.mark.parametrize("name", ["lambda_warmup_cosine2", "lambda_linear"])
def test_cycles_equal_the_recomputation(name):
    arguments, steps = ARGUMENTS[name], range(40)
    expected = [upstream(name, n, **arguments) for n in steps]
    np.testing.assert_allclose(values(LR_SCHEDULES[name](**arguments), steps), expected, rtol=2e-6)


def test_one_cosine_cycle_equals_the_recomputation():
    arguments, steps = ARGUMENTS["lambda_warmup_cosine"], range(40)
    keys = ("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps")
    lists = [(arguments[key],) for key in keys]
    expected = [upstream("lambda_warmup_cosine2", n, *lists) for n in steps]
    schedule = LR_SCHEDULES["lambda_warmup_cosine"](**arguments)
    np.testing.assert_allclose(values(schedule, steps), expected, rtol=2e-6)
    assert float(schedule(10**6)) == pytest.approx(0.1)


def test_released_configuration_is_constant_after_its_warm_up():
    schedule = LR_SCHEDULES["lambda_linear"](
        warm_up_steps=[10000], f_min=[1.0], f_max=[1.0], f_start=[1e-6], cycle_lengths=[1e13]
    )
    expected = [1e-6, 0.5 + 0.5e-6, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(
        values(schedule, [0, 5000, 10000, 10**6, 2**31 - 1]), expected, rtol=1e-6
    )


def test_linear_jumps_where_its_warm_up_ends_unless_the_levels_agree():
    arguments = ARGUMENTS["lambda_linear"] | {"f_min": (0.1, 0.8)}
    schedule = LR_SCHEDULES["lambda_linear"](**arguments)
    first = values(schedule, [3, 4])
    np.testing.assert_allclose(first, [0.01 + 0.99 * 3 / 4, 0.1 + 0.9 * 6 / 10], rtol=1e-6)
    second = values(schedule, [10 + 2, 10 + 3, 10 + 12])
    np.testing.assert_allclose(second, 0.8, rtol=1e-6)


def test_last_step_of_a_cycle_belongs_to_it_and_the_last_value_holds():
    for name in ("lambda_warmup_cosine2", "lambda_linear"):
        schedule = LR_SCHEDULES[name](**ARGUMENTS[name])
        np.testing.assert_allclose(values(schedule, [10]), 0.1, rtol=1e-5)
        np.testing.assert_allclose(values(schedule, [11]), 0.05 + 0.75 / 2, rtol=1e-5)
        np.testing.assert_allclose(values(schedule, [22, 23, 10**9]), 0.2, rtol=1e-5)


def test_no_warm_up():
    arguments = ARGUMENTS["lambda_warmup_cosine"] | {"warm_up_steps": 0}
    with jax.debug_nans(True):
        steps = values(LR_SCHEDULES["lambda_warmup_cosine"](**arguments), [0, 10, 20])
    np.testing.assert_allclose(steps, [1.0, 0.55, 0.1], rtol=1e-5)


def test_closed_forms():
    make = lambda name: LR_SCHEDULES[name](**ARGUMENTS[name])
    expected = {
        "constant": [0.5] * 5,
        "linear": [1, 0.5, 0, 0, 0],
        "polynomial": [1, 0.25, 0, 0, 0],
        "cosine_decay": [1, 0.55, 0.1, 0.1, 0.1],
        "exponential_decay": [1, 0.5**0.5, 0.5, 0.25, 0.125],
        "warmup_constant": [0, 1, 1, 1, 1],
        "warmup_cosine_decay": [0, 1, 0.75, 0, 0],
        "warmup_exponential_decay": [0, 1, 0.5**0.5, 0.5**1.5, 0.5**2.5],
        "piecewise_constant": [1, 0.5, 0.05, 0.05, 0.05],
        "piecewise_interpolate": [1, 0.5, 0.05, 0.05, 0.05],
        "inverse_sqrt": [1, (4 / 5) ** 0.5, 0.4**0.5, 0.2**0.5, (4 / 30) ** 0.5],
    }
    for name, numbers in expected.items():
        got = values(make(name), [0, 5, 10, 20, 30])
        np.testing.assert_allclose(got, numbers, rtol=1e-5, atol=1e-7, err_msg=name)
    assert values(make("linear_onecycle"), [0, 6]).tolist() == pytest.approx([1 / 25, 1])
    assert values(make("cosine_onecycle"), [0, 6]).tolist() == pytest.approx([1 / 25, 1])


CONTINUOUS = sorted(
    set(LR_SCHEDULES) - {"piecewise_constant", "lambda_linear", "lambda_warmup_cosine2"}
)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_small_steps_make_small_changes(name):
    """Stretched a thousandfold in time, no schedule moves by more than 0.01 in one step."""
    stretch = lambda v: tuple(1000 * i for i in v) if isinstance(v, tuple) else 1000 * v
    times = ("steps", "boundaries", "cycle_lengths")
    arguments = {
        key: stretch(value) if any(word in key for word in times) else value
        for key, value in ARGUMENTS[name].items()
    }
    schedule = jax.vmap(LR_SCHEDULES[name](**arguments))
    curve = np.asarray(schedule(jnp.arange(0, 40_000)))
    assert np.isfinite(curve).all() and curve.min() >= 0 and curve.max() <= 1 + 1e-6
    assert np.abs(np.diff(curve)).max() < 0.01


@pytest.mark.parametrize("name", sorted(LR_SCHEDULES))
def test_traced_step_gives_the_same_float32_scalar(name):
    schedule = LR_SCHEDULES[name](**ARGUMENTS[name])
    before = times_compiled("traced_schedule")

    @jax.jit
    def traced_schedule(n):
        return schedule(n)

    for n in (0, 3, 4, 10, 11, 500):
        value = traced_schedule(jnp.int32(n))
        assert value.dtype == jnp.float32 and value.shape == () and not value.weak_type
        np.testing.assert_allclose(float(value), float(schedule(n)), rtol=2e-6, atol=1e-7)
    assert times_compiled("traced_schedule") == before + 1


def test_table_rows_have_named_arguments_only():
    for name, factory in LR_SCHEDULES.items():
        kinds = {p.kind for p in inspect.signature(factory).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, name
        assert name in ARGUMENTS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "linear",
            "transition_steps: int, init_value: number = 1.0, end_value: number = 0.0, "
            "transition_begin: int = 0",
        ),
        (
            "exponential_decay",
            "transition_steps: int, decay_rate: number, transition_begin: int = "
            "0, staircase: bool = False, end_value: number | None = None",
        ),
        (
            "warmup_cosine_decay",
            "warmup_steps: int, decay_steps: int, init_value: number = 0.0, "
            "end_value: number = 0.0, exponent: number = 1.0",
        ),
        (
            "linear_onecycle",
            "transition_steps: int, pct_start: number = 0.3, pct_final: number = "
            "0.85, div_factor: number = 25.0, final_div_factor: number = 10000.0",
        ),
    ],
)
def test_the_keywords_of_optax_have_the_types_and_defaults_of_a_config(name, expected):
    signature = inspect.signature(LR_SCHEDULES[name])
    parameters = sorted(map(str, signature.parameters.values()))
    words = [text.replace("float | int", "number") for text in parameters]
    assert words == sorted(expected.split(", "))
    assert LR_SCHEDULES[name].__doc__


def test_warm_up_factor():
    schedule = with_warmup(constant(0.5), 4)
    expected = [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(values(schedule, range(6)), expected, rtol=1e-6)
    plain = constant()
    assert with_warmup(plain, 0) is plain
    with pytest.raises(ValueError, match="warmup_steps = -1 should be at least 0"):
        with_warmup(plain, -1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lambda_linear", {"f_min": (0.1,)}, "lists of lambda_linear should have one length"),
        ("lambda_linear", {"cycle_lengths": (10, 0)}, r"cycle_lengths\[1\] = 0 should be above 0"),
        ("lambda_warmup_cosine", {"max_decay_steps": 0}, "should be above 0"),
        ("linear", {"transition_steps": 0}, "linear.transition_steps = 0 should be above 0"),
        (
            "warmup_cosine_decay",
            {"decay_steps": 5},
            "decay_steps = 5 should be above warmup_steps = 5",
        ),
        ("inverse_sqrt", {"reference_steps": -1}, "inverse_sqrt.reference_steps = -1"),
        (
            "piecewise_constant",
            {"scales": (1.0,)},
            "lists of piecewise_constant should have one length",
        ),
        (
            "piecewise_interpolate",
            {"interpolate_type": "cubic"},
            "= 'cubic' is unknown; choose from linear, cosine",
        ),
    ],
)
def test_bad_arguments(name, change, message):
    with pytest.raises(ValueError, match=message):
        LR_SCHEDULES[name](**(ARGUMENTS[name] | change))
