"""New tokens of the tokenizer: found anywhere in a text, each as many tokens as vectors."""

import pytest

from diffusion_jax.data.new_tokens import with_new_tokens
from diffusion_jax.data.tokenizer import clip_tokenizer

VOCAB = 49408


@pytest.fixture(scope="module")
def plain():
    return clip_tokenizer()


def ids(tokenizer, text):
    count = int(tokenizer.num_tokens([text])[0])
    return tokenizer([text])[0][1 : count - 1].tolist()


def test_a_new_token_is_as_many_tokens_as_it_has_vectors(plain):
    tokenizer = with_new_tokens(plain, {"<cat-toy>": 3, "<dog>": 1}, VOCAB)
    toy, dog = [VOCAB, VOCAB + 1, VOCAB + 2], [VOCAB + 3]
    assert ids(tokenizer, "<cat-toy>") == toy
    assert ids(tokenizer, "A <CAT-toy>, and a <dog>!") == [
        *ids(plain, "a"), *toy, *ids(plain, ", and a"), *dog, *ids(plain, "!")
    ]  # fmt: skip
    assert tokenizer.num_tokens(["<cat-toy>"]) == [5]
    for text in ("a red fox", "cat - toy", "", "<cat>"):
        assert ids(tokenizer, text) == ids(plain, text)
    assert ids(plain, "<dog>") != dog  # the first tokenizer stays as it is


def test_more_tokens_follow_those_that_there_are(plain):
    first = with_new_tokens(plain, {"<a1>": 2}, VOCAB)
    both = with_new_tokens(first, {"<b1>": 2}, VOCAB)
    assert ids(both, "<b1> <a1>") == [VOCAB + 2, VOCAB + 3, VOCAB, VOCAB + 1]
    weighted = both._replace(weighted=True)(["(<b1>:1.5) x"])[0, 0]
    assert weighted[1:3].tolist() == [[VOCAB + 2, 1.5], [VOCAB + 3, 1.5]]


@pytest.mark.parametrize("token", ["cat", "Cat", "<|endoftext|>", "<a1>", "<A1>"])
def test_tokens_that_exist_are_refused(plain, token):
    known = with_new_tokens(plain, {"<a1>": 1}, VOCAB)
    with pytest.raises(ValueError, match=r"the token '.*' exists already; choose another"):
        with_new_tokens(known, {token: 1}, VOCAB)


@pytest.mark.parametrize("token", ["", "two words", " x"])
def test_what_is_no_word_is_refused(plain, token):
    with pytest.raises(ValueError, match="should be one word, such as <my-toy>"):
        with_new_tokens(plain, {token: 1}, VOCAB)
