"""What counts as weights, and what is said about everything else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.convert.weights.exporting import Exported, save_weights
from diffusion_jax.convert.weights.reading import diffusers_components, open_weights, weights_file

CKPT = Path(__file__).parents[1] / "data/lightning.ckpt"


def save(path, **arrays):
    """Write arrays, of which the first axis is the name's length, as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, [Exported({}, iter(()))], arrays)
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".CKPT", ""])
def test_files_by_torch_save_are_opened_whatever_their_name(suffix, tmp_path):
    path = shutil.copy(CKPT, tmp_path / f"x{suffix}")
    assert "model.full" in open_weights(path).tensors


@pytest.mark.parametrize("suffix", [".sft", ".SAFETENSORS", ".ckpt", ".pt", ""])
def test_safetensors_are_opened_whatever_their_name(suffix, tmp_path):
    path = save(tmp_path / "x.safetensors", a=np.arange(3)).rename(tmp_path / f"y{suffix}")
    assert open_weights(path).tensors["a"].load().tolist() == [0, 1, 2]


def test_safetensors_are_opened_and_read_late(tmp_path):
    path = save(tmp_path / "x.safetensors", a=np.arange(3))
    weights = open_weights(path)
    assert weights.path == path and weights.tensors["a"].shape == (3,)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        weights.tensors["a"].load()


def shards(folder, index="model.safetensors.index.json"):
    save(folder / "model-00001-of-00002.safetensors", a=np.arange(2))
    save(folder / "model-00002-of-00002.safetensors", b=np.arange(3), c=np.arange(4))
    places = {
        name: f"model-0000{n}-of-00002.safetensors" for name, n in zip("abc", "122", strict=True)
    }
    (folder / index).write_text(json.dumps({"weight_map": places}))
    return folder / index


def test_shards_are_one(tmp_path):
    index = shards(tmp_path)
    for path in (index, tmp_path):
        tensors = open_weights(path).tensors
        assert {name: tensor.load().size for name, tensor in tensors.items()} == {
            "a": 2,
            "b": 3,
            "c": 4,
        }


def test_shards_that_are_incomplete_are_told(tmp_path):
    (tmp_path / "inner").mkdir()
    index = shards(tmp_path / "inner")
    shards(tmp_path)
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"d": places["a"]}}))
    with pytest.raises(ValueError, match="00001-of-00002.safetensors holds d, and it does not"):
        open_weights(index)
    for shard in ("model-00003-of-00003.safetensors", "../model-00001-of-00002.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(FileNotFoundError, match="names the shard .*, which is not beside it"):
            open_weights(index)
    for text in ("[]", "{}", "{", '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match='needs a "weight_map"'):
            open_weights(index)


def test_parts_of_a_diffusers_folder(tmp_path):
    save(tmp_path / "unet/diffusion_pytorch_model.safetensors", a=np.arange(1))
    save(tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors", b=np.arange(1))
    save(tmp_path / "text_encoder/model.fp16.safetensors", c=np.arange(1))
    (tmp_path / "vae").mkdir()
    shutil.copy(CKPT, tmp_path / "vae/diffusion_pytorch_model.bin")
    assert diffusers_components(tmp_path) == ["unet", "vae", "text_encoder"]
    assert list(open_weights(tmp_path, "unet").tensors) == ["a"]
    assert list(open_weights(tmp_path, "unet", variant="fp16").tensors) == ["b"]
    assert list(open_weights(tmp_path, "text_encoder").tensors) == ["c"]
    assert "model.full" in open_weights(tmp_path, "vae").tensors
    # The folder of one part stands for itself, whatever part is asked for.
    assert list(open_weights(tmp_path / "unet", "unet").tensors) == ["a"]
    with pytest.raises(ValueError, match="choose one of unet, vae, text_encoder$"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match="text_encoder, not 'text_encoder_2'"):
        open_weights(tmp_path, "text_encoder_2")


def test_sharded_variants_carry_the_variant_before_json(tmp_path):
    index = shards(tmp_path, "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert weights_file(tmp_path) == weights_file(tmp_path, variant="fp16") == index
    assert len(open_weights(tmp_path).tensors) == 3


def test_any_one_variant_is_taken_and_several_are_told(tmp_path):
    save(tmp_path / "a/diffusion_pytorch_model.non_ema.safetensors", a=np.arange(1))
    assert list(open_weights(tmp_path / "a").tensors) == ["a"]
    save(tmp_path / "a/diffusion_pytorch_model.bf16.safetensors", b=np.arange(1))
    assert list(open_weights(tmp_path / "a", variant="bf16").tensors) == ["b"]
    for asked in (None, "fp8"):
        with pytest.raises(ValueError, match="weights; choose a variant from bf16, non_ema"):
            open_weights(tmp_path / "a", variant=asked)


def test_shards_by_torch_save_are_one(tmp_path):
    shutil.copy(CKPT, tmp_path / "pytorch_model-00001-of-00001.bin")
    places = {"model.full": "pytorch_model-00001-of-00001.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert list(open_weights(tmp_path).tensors) == ["model.full"]


def test_folders_without_weights_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no weights; looked for diffusion_pytorch"):
        open_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no fp16 weights"):
        open_weights(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        open_weights(tmp_path / "x.safetensors")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
BAD = {
    "is empty": ("x.safetensors", b""),
    "is a git-lfs pointer, not the weights; run `git lfs pull`": ("x.safetensors", LFS),
    "is a web page, not weights": ("x.safetensors", b"\n<!DOCTYPE html><html>no</html>"),
    "is a web page": ("x.ckpt", b"\xef\xbb\xbf<HTML>"),
    "is cut off or damaged": ("x.safetensors", b"PK\x03\x04"),
    "its header is not JSON": ("x.pt", bytes(8) + b"{}"),
    "a ZIP file, but no PyTorch checkpoint": ("x.npz", b"PK\x05\x06" + bytes(18)),
    "is a GGUF file, which is not read": ("x.gguf", b"GGUF\x03\0\0\0"),
    "is a bare pickle, which may run code": ("x.ckpt", b"\x80\x02}q\x00."),
    "is neither safetensors nor a file by torch.save: b'Entry not found'": (
        "x.safetensors",
        b"Entry not found",
    ),
    "holds no tensors": ("x.safetensors", (2).to_bytes(8, "little") + b"{}"),
    "is cut off": ("x.safetensors", (999).to_bytes(8, "little") + b"{"),
}


@pytest.mark.parametrize("message", BAD)
def test_files_that_are_no_weights_are_told(message, tmp_path):
    name, content = BAD[message]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_weights(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_parts_that_a_folder_calls_null_are_left_out(tmp_path):
    for part in ("unet", "vae", "image_encoder"):
        (tmp_path / part).mkdir()
    index = {"_class_name": "X", "image_encoder": [None, None], "unet": ["diffusers", "UNet"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert diffusers_components(tmp_path) == ["unet", "vae"]
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json is damaged: it is not JSON"):
        diffusers_components(tmp_path)


@pytest.mark.parametrize("name", ["x.sft", "X.CKPT", "x", "x.pt"])
def test_the_content_decides_and_not_the_name(tmp_path, name):
    save_weights(tmp_path / "x.safetensors", [], {"a": np.zeros(3)}, {"word": "here"})
    (tmp_path / "x.safetensors").rename(tmp_path / name)
    found = open_weights(tmp_path / name)
    assert found.tensors["a"].shape == (3,) and found.metadata["word"] == "here"
