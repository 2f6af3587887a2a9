"""Advice names the program as it was called."""

import os
import sys

import pytest

from diffusion_jax.cli import main
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


def test_a_user_without_a_home_can_use_the_program(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-at-all/cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert main(["options", "train"]) == 0 and "ckpt_path" in capsys.readouterr().out
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
