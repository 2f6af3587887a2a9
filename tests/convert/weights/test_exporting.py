"""Export: dtypes, names, and files that are there whole or not at all."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import Exported, export_params, save_weights
from diffusion_jax.convert.weights.safetensors import read_metadata, read_safetensors

TREE = {"out_0": {"scale": np.array([1.0, 2.0], np.float32), "bias": np.zeros(2, np.float32)}}


def test_dtypes_are_kept_or_cast(tmp_path):
    mixed = {"a": {"scale": jnp.ones(2, jnp.bfloat16), "bias": np.full(2, 1.5, np.float32)}}
    for dtype, expected in ((None, ("BF16", "F32")), (jnp.float16, ("F16", "F16"))):
        path = tmp_path / f"{dtype is None}.safetensors"
        save_weights(path, [export_params(mixed, "dotted", dtype=dtype)])
        tensors = read_safetensors(path)
        kinds = [jnp.dtype({"BF16": "bfloat16", "F32": "f4", "F16": "f2"}[k]) for k in expected]
        assert [tensors[name].dtype for name in ("a.weight", "a.bias")] == kinds
        assert tensors["a.bias"].load().tolist() == [1.5, 1.5]
    assert read_metadata(path) == {"format": "pt"}
    with pytest.raises(ValueError, match="dtype complex64 of out.0.bias cannot be written"):
        export_params(TREE, "dotted", dtype=np.complex64)


def test_networks_and_extras_share_a_file(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    parts = [export_params(TREE, "dotted", prefix) for prefix in ("a.", "b.")]
    save_weights(path, parts, {"betas": np.arange(3.0)})
    assert set(read_safetensors(path)) == {
        "a.out.0.weight",
        "a.out.0.bias",
        "b.out.0.weight",
        "b.out.0.bias",
        "betas",
    }
    with pytest.raises(ValueError, match="would hold a.out.0.bias twice"):
        save_weights(tmp_path / "y.safetensors", [export_params(TREE, "dotted", "a.")] * 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_nothing_is_overwritten_and_nothing_is_left_half(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="x.safetensors exists; choose another name"):
        save_weights(path, [export_params(TREE, "dotted")])
    assert path.read_bytes() == b"mine"
    with pytest.raises(ValueError, match="x.ckpt should end in .safetensors"):
        save_weights(tmp_path / "x.ckpt", [export_params(TREE, "dotted")])

    def breaks():
        yield "a", np.zeros(2)
        raise RuntimeError("the disk is on fire")

    described = {name: ((2,), np.dtype(np.float64)) for name in "ab"}
    with pytest.raises(RuntimeError):
        save_weights(tmp_path / "y.safetensors", [Exported(described, breaks())])
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    seen = []

    def tensors():
        seen.append("a")
        yield "a", np.zeros(2)

    path = tmp_path / "x.safetensors"
    save_weights(path, [Exported({"a": ((2,), np.dtype(np.float64))}, tensors())])
    assert seen == ["a"] and not path.exists()
