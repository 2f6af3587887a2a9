"""Files with vectors of new tokens, as the command line names them."""

from collections.abc import Sequence


def parse_embeddings(texts: Sequence[str]) -> list[tuple[str, str | None]]:
    """Read the values of --embedding, "toy.safetensors:<my-toy>" or a file alone -> (file, token).

    Raises ValueError for what names no token after the colon, and for a token that is given twice.
    """
    found: list[tuple[str, str | None]] = []
    for text in texts:
        path, colon, token = text.rpartition(":")
        if not colon or "/" in token:
            path, token = text, None
        if token == "" or not path:
            raise ValueError(f"--embedding={text} should be FILE or FILE:TOKEN")
        if token is not None and token in (own for _, own in found):
            raise ValueError(f"--embedding={text}: the token {token!r} should be given once")
        found.append((path, token))
    return found
