"""The format, byte by byte, and what is said about files that break it."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.convert.weights.safetensors import (
    CODES,
    DTYPES,
    read_safetensors,
    write_safetensors,
)


def written(arrays, metadata=None):
    file = io.BytesIO()
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(file, described, iter(arrays.items()), metadata or {})
    return file.getvalue()


def metadata_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__")


def test_bytes_are_those_of_the_format(tmp_path):
    content = written(
        {"a": np.array([1, 2], np.int16), "b": np.array(0.5, np.float32)}, {"format": "pt"}
    )
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 8 == 0
    assert json.loads(content[8 : 8 + length]) == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [4, 8]},
    }
    assert content[8 + length :] == b"\x01\x00\x02\x00\x00\x00\x00\x3f"


def test_a_file_written_by_hand_is_read(tmp_path):
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x40\xc0")
    tensor = read_safetensors(path)["x"]
    assert tensor.shape == (2, 1) and tensor.dtype == jnp.bfloat16
    assert tensor.load().tolist() == [[1.0], [-3.0]]


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_survives(code, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(DTYPES[code])
    path = tmp_path / "x.safetensors"
    path.write_bytes(written({"x": array}, {"format": "pt"}))
    tensor = read_safetensors(path)["x"]
    assert CODES[tensor.dtype] == code
    np.testing.assert_array_equal(tensor.load(), array)
    assert metadata_of(path) == {"format": "pt"}


def test_transposed_views_are_written_in_their_own_order(tmp_path, monkeypatch):
    # 3 slabs and a rest
    monkeypatch.setattr("diffusion_jax.convert.weights.safetensors._BLOCK", 64)
    array = np.arange(70, dtype=np.float32).reshape(10, 7).T.reshape(7, 5, 2)[:, ::-1]
    path = tmp_path / "x.safetensors"
    path.write_bytes(written({"x": array, "empty": array[:0], "none": array[:, :0]}))
    tensors = read_safetensors(path)
    np.testing.assert_array_equal(tensors["x"].load(), array)
    assert tensors["empty"].load().shape == (0, 5, 2) and tensors["none"].load().shape == (7, 0, 2)


def entry(**changed):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed


BAD = {
    "is cut off: it has": ({"x": entry(shape=[4], data_offsets=[0, 16])}, "download"),
    "damaged header: y begins at byte 0 of the content, and the tensor before it ends at 8": (
        {"x": entry(), "y": entry()},
        "",
    ),
    "damaged header: x begins at byte 4 of the content": (
        {"x": entry(shape=[1], data_offsets=[4, 8])},
        "",
    ),
    "is damaged: it has": ({"x": entry(shape=[1], data_offsets=[0, 4])}, "its tensors end at byte"),
    "damaged header: x is F32 (2,) in bytes 0 to 4": ({"x": entry(data_offsets=[0, 4])}, ""),
    "damaged header: x is F32 (True,)": (
        {"x": entry(shape=[True], data_offsets=[0, 4])},
        "",
    ),
    "its __metadata__ should map": ({"__metadata__": [], "x": entry()}, "words to words"),
    "is no safetensors file: its header is not JSON": ({"\ud800": entry()}, ""),
    "its __metadata__ should map words to words": ({"__metadata__": {"a": 1}, "x": entry()}, ""),
    "stores x as ['F32']": ({"x": entry(dtype=["F32"])}, ""),
    "damaged header: x is F32 (-2,)": ({"x": entry(shape=[-2], data_offsets=[8, 0])}, ""),
    "damaged header: x is F32 (2,) in bytes -8 to 0": ({"x": entry(data_offsets=[-8, 0])}, ""),
    "stores x as F4; known are F64, F32": ({"x": entry(dtype="F4")}, ""),
    "header that does not describe x": ({"x": {"dtype": "F32"}}, ""),
    "its header is not a JSON object": ([1], ""),
}


@pytest.mark.parametrize("message", BAD)
def test_headers_that_lie_are_told(message, tmp_path):
    header, advice = BAD[message]
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError) as error:
        read_safetensors(path)
    assert message in str(error.value) and advice in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((999).to_bytes(8, "little") + b"{", "is cut off: it has 9 bytes"),
        ((2).to_bytes(8, "little") + b"{!", "its header is not JSON"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "its header is not JSON"),
        ((14).to_bytes(8, "little") + b'{"x":1,"x": 1}', "describes 'x' twice"),
        (b"\xff" * 8 + b"{", "its header would be"),
    ],
)
def test_broken_beginnings_are_told(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_safetensors(path)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(written({"x": np.ones(9, np.float32)}))
    tensor = read_safetensors(path)["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="became shorter"):
        tensor.load()


def test_what_was_not_announced_is_refused():
    described = {"x": ((2,), np.float32)}
    for given in ({"y": np.ones(2, np.float32)}, {"x": np.ones(3, np.float32)}, {"x": np.ones(2)}):
        with pytest.raises(ValueError, match="was announced and"):
            write_safetensors(io.BytesIO(), described, iter(given.items()), {})
