"""Files with the vectors of a token, in each layout that is read, and what is none."""

import numpy as np
import pytest

from diffusion_jax.convert.weights.embeddings import Embedding, read_embedding, write_embedding
from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.safetensors import read_safetensors

RNG = np.random.default_rng(0)
TWO, THREE = (RNG.normal(size=(2, width)).astype(np.float32) for width in (4, 6))


def load_file(path):
    return {name: tensor.load() for name, tensor in read_safetensors(path).items()}


def test_what_is_written_is_what_others_read_and_read_again(tmp_path):
    one, pair = tmp_path / "one.safetensors", tmp_path / "pair.safetensors"
    write_embedding(one, Embedding("<toy>", {None: TWO}))
    assert list(load_file(one)) == ["<toy>"]
    np.testing.assert_array_equal(load_file(one)["<toy>"], TWO)
    write_embedding(pair, Embedding("<toy>", {"clip_l": TWO, "clip_g": THREE}), dtype=np.float16)
    assert sorted(load_file(pair)) == ["clip_g", "clip_l"]
    assert load_file(pair)["clip_g"].dtype == np.float16
    again = read_embedding(one)
    assert again.token == "<toy>"
    np.testing.assert_array_equal(again.vectors[None], TWO)
    again = read_embedding(pair, "<my-toy>")
    assert again.token == "<my-toy>" and set(again.vectors) == {"clip_l", "clip_g"}
    np.testing.assert_allclose(again.vectors["clip_l"], TWO, atol=1e-2)
    with pytest.raises(FileExistsError):
        write_embedding(one, Embedding("<toy>", {None: TWO}))


def test_files_without_a_name_of_the_token_have_their_own(tmp_path):
    path = tmp_path / "fox.safetensors"
    save_weights(path, [], {"emb_params": TWO})
    assert read_embedding(path).token == "fox"
    save_weights(tmp_path / "other.safetensors", [], {"<fox>": TWO[0]})
    found = read_embedding(tmp_path / "other.safetensors")
    assert found.token == "<fox>" and found.vectors[None].shape == (1, 4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": TWO, "b": TWO}, "has a, b, and should have the vectors of one token"),
        ({"a": np.zeros((2, 2, 2), np.float32)}, "has a, and should have the vectors of one token"),
        ({"clip_l": TWO, "clip_g": THREE[:1]}, "as many vectors for clip_l as for clip_g"),
        ({"a": np.full((1, 3), np.nan, np.float32)}, "numbers that are not all finite"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, message):
    path = tmp_path / "x.safetensors"
    save_weights(path, [], tensors)
    with pytest.raises(ValueError, match=message):
        read_embedding(path)


def test_no_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no weights at"):
        read_embedding(tmp_path / "none.safetensors")
