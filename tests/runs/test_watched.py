"""How far a call is, in rounds and steps; Pipeline's own test draws with it."""

import jax.numpy as jnp
import pytest

from diffusion_jax.diffusion.samplers.driver import Samples
from diffusion_jax.diffusion.samplers.watching import ask
from diffusion_jax.runs.watched import Stopped, draw_watched


def drawing(steps):
    def draw(*, watched):
        assert watched
        return Samples(jnp.array([step for step in steps if ask(step)]), None, None)

    return draw


def test_steps_of_a_part_of_the_second_round_are_counted_on():
    seen = []
    draw_watched(drawing(range(4, 7)), lambda *at: seen.append(at), (4, 7), (1, 3))
    assert seen == [(3, 9), (4, 9), (5, 9)]


def test_false_stops_for_good_and_none_does_not():
    answers = iter([None, False, True])
    with pytest.raises(Stopped):
        draw_watched(drawing(range(3)), lambda *_: next(answers), (0, 3), (0, 1))
