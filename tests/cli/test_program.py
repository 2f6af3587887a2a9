"""Advice names the program as it was called."""

import sys

import pytest

from diffusion_jax.cli.program import program_name


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
