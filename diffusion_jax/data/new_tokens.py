"""New tokens of a tokenizer; each may be several tokens for the text encoder."""

from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer

from diffusion_jax.data.tokenizer import ClipTokenizer

_END_OF_WORD = "</w>"


def with_new_tokens(
    tokenizer: ClipTokenizer, counts: Mapping[str, int], vocab_size: int
) -> ClipTokenizer:
    """Make a tokenizer that knows new tokens besides, in upper and lower case.

    counts: token -> how many tokens it is for the text encoder; these get the numbers from
    vocab_size on, in this order, after the new tokens that the tokenizer has already.
    Raises ValueError for a token that exists already, and for what is no token.
    """
    whole = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    added = dict(tokenizer.added)
    first = vocab_size + sum(map(len, added.values()))
    for token, count in counts.items():
        _check(whole, token)
        whole.add_tokens([AddedToken(token, normalized=True)])
        number = whole.token_to_id(token)
        assert number is not None  # it was added
        added[number] = tuple(range(first, first + count))
        first += count
    return tokenizer._replace(tokenizer=whole, added=added)


def _check(tokenizer: Tokenizer, token: str) -> None:
    if token.split() != [token]:
        raise ValueError(f"the token {token!r} should be one word, such as <my-toy>")
    known = {word.lower() for word in tokenizer.get_vocab(with_added_tokens=True)}
    if {token.lower(), token.lower() + _END_OF_WORD} & known:
        raise ValueError(f"the token {token!r} exists already; choose another, such as <my-toy>")
