"""From the strings of a batch to the tokens that text embedders read."""

import functools
from collections.abc import Mapping

from diffusion_jax.data.tokenizer import ClipTokenizer, clip_tokenizer
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.models.conditioning.conditioner import Embedder, Text


@functools.cache
def tokenizer_of(text: Text) -> ClipTokenizer:
    """Make the tokenizer of a text input: strings -> [n *text.shape].

    Raises ValueError when there is no vocabulary; the message says how to get one.
    """
    own = clip_tokenizer(text.vocabulary, max_length=text.max_length, pad=text.pad)
    return own._replace(windows=text.windows, weighted=text.weighted)


def tokenizers_of(embedders: Mapping[str, Embedder]) -> dict[str, tuple[str, ClipTokenizer]]:
    """Map the name of the tokens in a batch to the name of their strings and the tokenizer."""
    texts = [embedder.text for embedder in embedders.values() if embedder.text is not None]
    return {text.tokens_key: (text.source, tokenizer_of(text)) for text in texts}


def with_null_tokens(embedder: Embedder, path: str) -> Embedder:
    """Replace a null value that is a string, such as the empty prompt, by its tokens."""
    if not isinstance(embedder.null_value, str):
        return embedder
    if embedder.text is None:
        raise ConfigError(f"{path}.null_value = {embedder.null_value!r} is for text embedders")
    tokenize = tokenizer_of(embedder.text)
    return embedder._replace(null_value=tokenize.plain()([embedder.null_value])[0])
