"""What embedders read and a host batch lacks: tokens of texts, hints of images, defaults."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.data.tokenizer import ClipTokenizer
from diffusion_jax.experiment.network.frames import FRAME_INPUTS
from diffusion_jax.models.conditioning.conditioner import Embedder, cached_outputs


def add_inputs(
    embedders: Mapping[str, Embedder],
    tokenize: Mapping[str, tuple[str, ClipTokenizer]],
    batch: Mapping[str, Any],
) -> dict[str, Any]:
    """Add to a host batch all that embedders read and that can be made of what it has.

    An embedder whose outputs are in the batch already needs no input. tokenize: see Network.
    """
    read = {e.input_key for n, e in embedders.items() if not cached_outputs(batch, n)}
    tokens = {
        key: tokens_of([str(text) for text in batch[source]])
        for key, (source, tokens_of) in tokenize.items()
        if source in batch and key not in batch and key in read
    }
    made = {
        e.input_key: e.made_of_image(np.asarray(batch["image"]))
        for e in embedders.values()
        if e.made_of_image is not None and e.input_key not in batch and "image" in batch
    }
    count, height, width = _size_of(batch)
    defaults = {
        embedder.input_key: np.tile(
            np.asarray(
                (height, width) if embedder.default == "size" else embedder.default,
                embedder.dtype,
            ),
            (count, 1),
        )
        for embedder in embedders.values()
        if embedder.default is not None and embedder.input_key not in (*batch, *FRAME_INPUTS)
    }
    return {**batch, **tokens, **made, **defaults}


def _size_of(batch: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return number, height and width of the images that a batch has, or was encoded from."""
    if "image" in batch:
        shape = np.shape(batch["image"])
        return shape[0], *shape[-3:-1]
    return len(batch["moments"]), *batch["target_size"][0].tolist()
