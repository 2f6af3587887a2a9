"""Advice names the program as it was called."""

import os
import pathlib
import sys

import jax
import pytest

from diffusion_jax.cli import main
from diffusion_jax.cli.program import EXIT_SIGNAL, exit_code, program_name, sentence_of
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


def test_a_user_without_a_home_can_use_the_program(monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-at-all/cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert main(["options", "train"]) == 0 and "ckpt_path" in capsys.readouterr().out
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_an_exit_code_tells_a_sentence_from_a_traceback():
    ours = raised_by(lambda: place_of_flags("here", None, None, None))
    assert isinstance(ours, ValueError) and exit_code(ours) == 2
    assert exit_code(raised_by(lambda: int("x"))) == 1
    assert exit_code(RuntimeError()) == 1
    assert exit_code(Interrupted("SIGTERM")) == EXIT_SIGNAL == 75


def test_what_the_system_says_of_a_file_is_a_sentence(tmp_path):
    for act, said in (
        (lambda: pathlib.Path("/dev/full").write_text("x"), "writing: No space left on device"),
        (
            lambda: pathlib.Path("/proc/self/attr").write_text("x"),
            "/proc/self/attr: Is a directory",
        ),
        (lambda: (tmp_path / ("x" * 300)).read_text(), f"{tmp_path}/{'x' * 300}: File name too lo"),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert exit_code(caught.value) == 2
        assert sentence_of(caught.value).startswith(said)
    for error in (
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nx"),
    ):
        assert exit_code(error) == 2 and "\n" not in sentence_of(error)
        assert "config.train.batch_size" in sentence_of(error)
    assert exit_code(jax.errors.JaxRuntimeError("INTERNAL: x")) == 1
    assert exit_code(FileNotFoundError(2, "No such file or directory", "x")) == 1
