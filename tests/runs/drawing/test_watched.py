"""How far a call is, in rounds and steps; Pipeline's own test draws with it."""

import jax.numpy as jnp
import pytest

from diffusion_jax.diffusion.samplers.driver import Samples
from diffusion_jax.diffusion.samplers.watching import ask
from diffusion_jax.runs.drawing.watched import Stopped, draw_watched


def drawing(steps):
    def draw(*, watched):
        assert watched
        return Samples(jnp.array([n for n in range(steps) if ask(n, steps)]), None, None)

    return draw


def test_steps_of_the_second_round_are_counted_on():
    seen = []
    draw_watched(drawing(3), lambda *at: seen.append(at), 1, 3)
    assert seen == [(3, 9), (4, 9), (5, 9)]


def test_false_stops_for_good_and_none_does_not():
    answers = iter([None, False, True])
    with pytest.raises(Stopped):
        draw_watched(drawing(3), lambda *_: next(answers), 0, 1)
