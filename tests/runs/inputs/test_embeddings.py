"""Values of --embedding."""

import pytest

from diffusion_jax.runs.inputs.embeddings import parse_embeddings


def test_a_file_may_have_a_token():
    assert parse_embeddings(["a.safetensors", "b/c.pt:<toy>", "x:y/z.bin"]) == [
        ("a.safetensors", None), ("b/c.pt", "<toy>"), ("x:y/z.bin", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a.pt:"], "--embedding=a.pt: should be FILE or FILE:TOKEN"),
        ([":<toy>"], "--embedding=:<toy> should be FILE or FILE:TOKEN"),
        (["a.pt:<toy>", "b.pt:<toy>"], "the token '<toy>' should be given once"),
    ],
)
def test_what_is_neither_is_told(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_embeddings(texts)
