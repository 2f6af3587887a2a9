"""Export: dtypes, names, and files that are there whole or not at all."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import (
    Exported,
    check_target,
    export_network,
    export_params,
    save_weights,
)
from diffusion_jax.convert.weights.importing import import_network
from diffusion_jax.convert.weights.names import KINDS
from diffusion_jax.convert.weights.safetensors import read_safetensors
from diffusion_jax.models.dit import DiT
from diffusion_jax.models.unet.control_net import ControlNet
from diffusion_jax.models.unet.unet import UNet

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
    assert b'"__metadata__":{"format":"pt"}' in path.read_bytes()
    with pytest.raises(ValueError, match="dtype complex64 of out.0.bias cannot be written"):
        export_params(TREE, "dotted", dtype=np.complex64)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn])
def test_numbers_too_large_for_a_dtype_are_not_written(dtype, tmp_path):
    tree = {"out_0": {"scale": np.array([1e30, 1.0, -1e30, np.inf, np.nan], np.float32)}}
    path = tmp_path / "x.safetensors"
    message = f"2 numbers of out.0.weight become infinite as {np.dtype(dtype)}; choose dtype = bf"
    with pytest.raises(ValueError, match=message):
        save_weights(path, [export_params(tree, "dotted", dtype=dtype)])
    assert not list(tmp_path.iterdir())
    save_weights(path, [export_params(tree, "dotted", dtype=jnp.bfloat16, nonfinite=True)])
    assert np.isfinite(read_safetensors(path)["out.0.weight"].load()).sum() == 3


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


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_import_takes_back_what_export_wrote(kind, dtype, unet, vae, text, vision, draw, tmp_path):
    """Bit for bit, with the names of the file alone to go by."""
    image, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,))
    dit = jax.eval_shape(DiT(3, 16, 2, 2).init, jax.random.key(0), image, t)["params"]
    hint = jnp.zeros((1, 64, 64, 3))
    control = ControlNet(UNet(3, 32, (1, 2), num_res_blocks=1), (16, 32, 96, 256))
    control = jax.eval_shape(control.init, jax.random.key(0), image, t, hint)["params"]
    others = {"dit": dit, "controlnet": control, "clip text": text, "clip vision": vision}
    shapes = ({"unet": unet(), "vae": vae()} | others)[kind]
    params, path = draw(shapes), tmp_path / "x.safetensors"
    export_network(params, path, kind, dtype=dtype)
    assert {t.dtype for t in read_safetensors(path).values()} == {jnp.dtype(dtype or jnp.float32)}
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), expected)
    read = import_network(wanted, path, kind)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for mine, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        assert mine.dtype == theirs.dtype and np.asarray(mine).tobytes() == theirs.tobytes()


def test_a_stacked_unet_is_written_block_by_block(unet, draw, same, tmp_path):
    params, path = draw(unet(scan=True)), tmp_path / "x.safetensors"
    export_network(params, path, "unet")
    assert same(import_network(unet(scan=True), path, "unet"), params)
    assert "middle_block.1.transformer_blocks.1.norm1.bias" in read_safetensors(path)


def test_unknown_kinds_and_files_that_exist_are_refused(unet, draw, tmp_path):
    params, path = draw(unet()), tmp_path / "x.safetensors"
    message = (
        "kind = 'clip' is unknown; choose from unet, dit, controlnet, vae, clip text, clip vision"
    )
    with pytest.raises(ValueError, match=message):
        export_network(params, path, "clip")
    with pytest.raises(ValueError, match=message):
        import_network(params, path, "clip")
    export_network(params, path, "unet")
    with pytest.raises(FileExistsError, match="x.safetensors exists; choose another name"):
        export_network(params, path, "unet")


def test_numbers_that_are_none_are_refused_unless_told(tmp_path):
    tree = {"a": np.array([1.0, np.nan], np.float32), "b": np.array([1e30], np.float32)}
    for dtype, message in (
        (None, "1 number of a is NaN or infinite; --nonfinite writes them"),
        (np.float16, "1 number of a is NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            save_weights(tmp_path / "x.safetensors", [export_params(tree, "dotted", dtype=dtype)])
    assert not list(tmp_path.iterdir())
    told = export_params(tree, "dotted", dtype=np.float16, nonfinite=True)
    save_weights(tmp_path / "x.safetensors", [told])
    assert np.isinf(read_safetensors(tmp_path / "x.safetensors")["b"].load()).all()


def test_a_target_that_cannot_be_written_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    exported = export_params(TREE, "dotted")
    with pytest.raises(ValueError, match="x.safetensors cannot be written: .*file is a file"):
        save_weights(tmp_path / "file/a/x.safetensors", [exported])
    (tmp_path / "closed").mkdir(mode=0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write everywhere
        with pytest.raises(ValueError, match="the folder .*closed is read-only"):
            check_target(tmp_path / "closed/a/x.safetensors")
