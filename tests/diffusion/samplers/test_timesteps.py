"""Which timesteps are visited: spacings of upstream and of diffusers, any number of steps."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.diffusion.samplers.timesteps import (
    DISCRETIZATIONS,
    Discretize,
    visited_timesteps,
)

NAMES = ("uniform", "uniform_ldm", "quad", "leading", "trailing", "linspace")


def test_uniform_is_upstreams_where_steps_divide():
    visited, previous = visited_timesteps(1000, 50, "uniform")
    np.testing.assert_array_equal(visited, np.arange(50) * 20 + 1)
    np.testing.assert_array_equal(previous, [0, *visited[:-1]])


def test_uniform_spans_the_schedule_where_steps_do_not_divide():
    """Upstream would take 334 steps for 300."""
    visited, _ = visited_timesteps(1000, 300, "uniform")
    assert len(visited) == 300 and visited[0] == 1 and visited[-1] == 997
    assert set(np.diff(visited)) == {3, 4}


def test_uniform_ldm_takes_as_many_steps_as_fit():
    """31 for 30 of 1000: every 33rd timestep, plus 1."""
    visited, previous = visited_timesteps(1000, 30, "uniform_ldm")
    assert visited.tolist() == list(range(1, 1001, 33)) and len(visited) == 31
    assert previous.tolist() == [0, *range(1, 968, 33)]
    for name in ("uniform", "uniform_ldm"):
        np.testing.assert_array_equal(visited_timesteps(1000, 50, name)[0], np.arange(50) * 20 + 1)
    for steps in (300, 1000):
        with pytest.raises(ValueError, match=f"num_steps = {steps} makes uniform_ldm visit timest"):
            visited_timesteps(1000, steps, "uniform_ldm")


def test_quad_is_upstreams_where_it_does_not_repeat():
    visited, previous = visited_timesteps(1000, 50, "quad")
    assert visited[:6].tolist() == [1, 2, 3, 4, 6, 9]  # upstream: 1, 1, 2, 3, 6, 9
    assert visited[-2:].tolist() == [768, 801]
    assert previous[0] == 0


def test_diffusers_spacings():
    visited = {name: visited_timesteps(1000, 10, name)[0] for name in NAMES}
    np.testing.assert_array_equal(visited["leading"], np.arange(10) * 100)
    np.testing.assert_array_equal(visited["trailing"], np.arange(10) * 100 + 99)
    np.testing.assert_array_equal(visited["linspace"], np.arange(10) * 111)
    assert visited_timesteps(1000, 1, "linspace")[0].tolist() == [999]
    assert visited_timesteps(1000, 1, "trailing")[0].tolist() == [999]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_every_spacing_takes_exactly_the_steps_asked_for(data):
    total = data.draw(st.integers(1, 1200), "T")
    steps = data.draw(st.integers(1, total), "S")
    name = data.draw(st.sampled_from([name for name in NAMES if name != "uniform_ldm"]))
    visited, previous = visited_timesteps(total, steps, name)
    assert visited.shape == previous.shape == (steps,)
    assert visited.dtype == previous.dtype == np.int32
    assert visited[0] >= 0 and visited[-1] <= total - 1
    assert np.all(np.diff(visited) > 0)
    np.testing.assert_array_equal(previous[1:], visited[:-1])
    assert previous[0] == (0 if name in ("uniform", "quad") and visited[0] > 0 else -1)


@pytest.mark.parametrize("steps", [0, 11, -3])
def test_steps_outside_the_schedule_are_refused(steps):
    with pytest.raises(ValueError, match=rf"num_steps = {steps} should lie in \[1, 10\]"):
        visited_timesteps(10, steps, "uniform")


def test_unknown_spacing_lists_the_choices():
    with pytest.raises(ValueError, match="'even' is unknown; choose from " + ", ".join(NAMES)):
        visited_timesteps(10, 5, "even")
    assert get_args(Discretize) == tuple(DISCRETIZATIONS) == NAMES
