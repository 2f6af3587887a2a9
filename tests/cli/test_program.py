"""Advice names the program as it was called."""

import sys

import pytest

from diffusion_jax.cli.program import EXIT_SIGNAL, exit_code, program_name
from diffusion_jax.devices.processes import place_of_flags
from diffusion_jax.train.hooks.received import Interrupted


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("launch.py", "python launch.py"),
        ("/home/me/diffusion_jax/launch.py", "python launch.py"),
        ("/x/site-packages/diffusion_jax/__main__.py", "python -m diffusion_jax"),
        ("/x/bin/diffusion-jax", "diffusion-jax"),
    ],
)
def test_the_program_is_named_as_it_was_called(monkeypatch, called, name):
    monkeypatch.setattr(sys, "argv", [called, "report"])
    assert program_name() == name


def raised_by(act):
    with pytest.raises(ValueError) as caught:
        act()
    return caught.value


def test_an_exit_code_tells_a_sentence_from_a_traceback():
    ours = raised_by(lambda: place_of_flags("here", None, None, None))
    assert isinstance(ours, ValueError) and exit_code(ours) == 2
    assert exit_code(raised_by(lambda: int("x"))) == 1
    assert exit_code(RuntimeError()) == 1
    assert exit_code(Interrupted("SIGTERM")) == EXIT_SIGNAL == 75
