"""Vectors of new tokens (textual inversion) in the files that other tools read and write."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.convert.weights.exporting import save_weights
from diffusion_jax.convert.weights.reading import open_weights
from diffusion_jax.convert.weights.torch_pickle import INVERSION

# What SDXL's two text encoders are called in such files.
CLIP_L, CLIP_G = PAIR = ("clip_l", "clip_g")
# Names that say nothing of the token: files of AUTOMATIC1111's web interface.
_UNNAMED = re.compile(rf"emb_params|{INVERSION}/.*")


class Embedding(NamedTuple):
    """A token and its vectors.

    vectors: name of a text encoder (clip_l, clip_g) -> float [n d]; None stands for the only one.
    """

    token: str
    vectors: dict[str | None, np.ndarray]


def read_embedding(path: str | os.PathLike, token: str | None = None) -> Embedding:
    """Read the vectors of one token, which a file has under its name, or for two text encoders.

    These are {token: [n d]}, {"emb_params": [n d]} and {"clip_l": [n d], "clip_g": [n d]}.
    token: what it is called in prompts; None is the name in the file, or without one the file's.
    Raises ValueError for a file without vectors, or with more than one token; FileNotFoundError.
    """
    path = Path(os.path.expanduser(path))
    tensors = open_weights(path).tensors
    arrays = {name: tensors[name] for name in tensors if 1 <= len(tensors[name].shape) <= 2}
    names: Mapping[str, str | None]
    if set(PAIR) <= set(arrays):
        found, names = path.stem, {name: name for name in PAIR}
    elif len(arrays) == 1 or any(map(_UNNAMED.fullmatch, arrays)):
        name = next(filter(_UNNAMED.fullmatch, arrays), next(iter(arrays)))
        found, names = path.stem if _UNNAMED.fullmatch(name) else name, {name: None}
    else:
        there = ", ".join(list(tensors)[:4]) or "no tensors"
        raise ValueError(
            f"{path} has {there}{' ...' if len(tensors) > 4 else ''}, and should have the vectors "
            "of one token: {token: [n, d]}, emb_params, or clip_l and clip_g"
        )
    vectors = {own: np.atleast_2d(np.asarray(arrays[name].load())) for name, own in names.items()}
    for own in vectors.values():
        if not np.isfinite(own).all() or not own.size:
            raise ValueError(
                f"{path} holds vectors with {own.size} numbers that are not all finite"
            )
    if len({len(own) for own in vectors.values()}) != 1:
        raise ValueError(f"{path} should have as many vectors for clip_l as for clip_g")
    return Embedding(found if token is None else token, vectors)


def write_embedding(path: str | os.PathLike, embedding: Embedding, *, dtype: Any = None) -> None:
    """Write the vectors of a token as diffusers and AUTOMATIC1111's web interface read them.

    Raises FileExistsError, and ValueError for another ending than .safetensors.
    """
    tensors: Mapping[str, np.ndarray] = {
        embedding.token if name is None else name: np.asarray(own, dtype or np.float32)
        for name, own in embedding.vectors.items()
    }
    save_weights(path, [], tensors, {"token": embedding.token})
