"""--debug stops at the first NaN, and opens a debugger for a person only."""

import pdb
import sys

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.cli.debugging import debugging


def test_without_the_flag_nothing_changes():
    with debugging(False):
        assert not jax.config.jax_debug_nans and jnp.isnan(jnp.log(-1.0))


@pytest.mark.parametrize("terminal", [False, True])
def test_with_the_flag_a_nan_is_an_error_and_a_person_gets_a_debugger(monkeypatch, terminal):
    opened = []
    monkeypatch.setattr(pdb, "post_mortem", lambda: opened.append(sys.exception()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)
    with pytest.raises(FloatingPointError), debugging(True):
        jnp.log(-1.0)
    assert len(opened) == terminal and not jax.config.jax_debug_nans
