"""The end of a command: exit codes, and errors in one sentence."""

import pathlib

import jax
import pytest

from diffusion_jax.devices.processes import place_of_flags
from diffusion_jax.runs.failures import EXIT_SIGNAL, exit_code, sentence_of
from diffusion_jax.train.hooks.received import Interrupted


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
