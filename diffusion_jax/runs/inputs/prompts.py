"""Prompts of any length, plain or weighted -> the tokens that text encoders read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data.tokenizer import ClipTokenizer
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.models.conditioning.windows import IN_WINDOWS, WEIGHTED

# More would be a mistake, and each costs attention in every layer.
MOST_WINDOWS = 16


def tokens_of(
    tokenize: ClipTokenizer, name: str, texts: Sequence[Any], weighted: bool | None
) -> np.ndarray:
    """Tokenize prompts in as many windows as the longest of them needs, or training had.

    Plain prompts that fit in one window are int32 [n l]; see models.conditioning.windows for
    others. name: of the input, for messages. weighted: None for what training had.
    Raises ValueError for what is no text, and for more windows than MOST_WINDOWS.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} = {text!r} should be a text")
    weighted = tokenize.weighted if weighted is None else weighted
    tokenize = tokenize._replace(weighted=weighted)
    room = tokenize.max_length - 2
    for text, length in zip(texts, tokenize.num_tokens(texts), strict=True):
        if length - 2 > MOST_WINDOWS * room:
            raise ValueError(
                f"the {name} {_shortened(text)} has {length - 2} tokens; a prompt has at most "
                f"{MOST_WINDOWS * room}, so make it shorter"
            )
    windows = max(tokenize.windows, tokenize.num_windows(texts))
    return tokenize._replace(windows=windows)(texts)


def alike(
    network: Network, inputs: Mapping[str, np.ndarray], negative: Mapping[str, np.ndarray] | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Give all texts of a call the same number of windows, and weights to all or none.

    What is shorter is filled up with windows of empty text. Weights that are all 1 are left out,
    so that a prompt without them is read by the program that reads plain ones.
    """
    sides = [dict(inputs), {} if negative is None else dict(negative)]
    places = [(side, key) for side in sides for key in network.tokenize if key in side]
    wide = [_in_windows(side[key]) for side, key in places]
    if not wide:
        return sides[0], negative if negative is None else sides[1]
    windows = max(tokens.shape[1] for tokens in wide)
    weighted = any((tokens[..., 1] != 1.0).any() for tokens in wide)
    for (side, key), tokens in zip(places, wide, strict=True):
        empty = network.tokenize[key][1]._replace(windows=1, weighted=True)([""])
        filling = np.repeat(empty, windows - tokens.shape[1], axis=1)
        filling = np.broadcast_to(filling, (len(tokens), *filling.shape[1:]))
        filled = np.concatenate([tokens, filling], axis=1)
        plain = filled[..., 0].astype(np.int32)
        side[key] = filled if weighted else plain[:, 0] if windows == 1 else plain
    return sides[0], None if negative is None else sides[1]


def _in_windows(tokens: np.ndarray) -> np.ndarray:
    """Bring tokens of any form into that with windows and weights, float32 [n w l 2]."""
    if tokens.ndim == WEIGHTED:
        return tokens
    wide = tokens if tokens.ndim == IN_WINDOWS else tokens[:, None]
    return np.stack([wide.astype(np.float32), np.ones(wide.shape, np.float32)], -1)


def _shortened(text: str, length: int = 40) -> str:
    return repr(text) if len(text) <= length else f"{text[:length]!r}... ({len(text)} characters)"
